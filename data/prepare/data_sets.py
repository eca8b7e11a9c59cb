"""Hugging Face data sets, by name or on disk, in parts that processes read side by side."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import datasets.exceptions
import pyarrow

from ..config import SourceConfig

# What the library raises for a data set that is not there, not readable or not as declared.
_ERRORS = (OSError, ValueError, RuntimeError, ImportError, KeyError, datasets.exceptions.DatasetsError)


def num_parts(source: SourceConfig, part_bytes: int) -> int:
    """Return in how many parts a data set is read: a stream's own files, else its bytes by `part_bytes`."""
    data_set = _open(source)
    if isinstance(data_set, datasets.IterableDataset):
        return max(1, data_set.num_shards)
    return max(1, min(-(-data_set.data.nbytes // part_bytes), data_set.num_rows))


def data_set_rows(source: SourceConfig, part: int, parts: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, row) of one part's rows. Raises ValueError that names the data set, whatever goes wrong."""
    data_set = _open(source)
    if isinstance(data_set, datasets.IterableDataset):
        mine = data_set.shard(num_shards=parts, index=part)  # its parts are its files
    else:
        mine = data_set.shard(num_shards=parts, index=part, contiguous=True)
    rows = enumerate(mine, start=1)
    where = f"{source.path}[{source.split}], part {part} of {parts}"
    with _quiet():
        while True:
            try:
                number, row = next(rows)
            except StopIteration:
                return
            except (*_ERRORS, pyarrow.ArrowException) as error:
                raise ValueError(f"data.source: cannot read {where}: {error}; repair it or leave it out") from error
            yield f"{where}: row {number}", row


def _open(source: SourceConfig) -> "datasets.Dataset | datasets.IterableDataset":
    where = f"data set {source.path!r}, split {source.split!r}"
    with _quiet():
        try:
            if source.kind == "hub":
                return datasets.load_dataset(
                    source.path, source.subset or None, split=source.split, streaming=source.streaming
                )
            loaded = datasets.load_from_disk(source.path)
            return loaded[source.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        except _ERRORS as error:
            raise ValueError(f"data.source: cannot read {where}: {error}; see data.source.path and .split") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's log and bars off the terminal: what it logs before raising, our error says again."""
    level, bars_shown = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars_shown:
            datasets.enable_progress_bars()
