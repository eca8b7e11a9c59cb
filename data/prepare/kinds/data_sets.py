"""Hugging Face data sets, by name or on disk, in parts that processes read independently."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import datasets.exceptions
import pyarrow

from ...config import SourceConfig
from .columns import BATCH_ROWS, fields_of, rows_of

# Errors of the library for a data set that is missing, unreadable or other than declared.
_ERRORS = (OSError, ValueError, RuntimeError, ImportError, KeyError, datasets.exceptions.DatasetsError)


def num_parts(source: SourceConfig, part_bytes: int) -> int:
    """Return the number of parts of a data set: the files of a stream, otherwise its size over `part_bytes`.

    Raises ValueError if the data set cannot be opened.
    """
    data_set = _open(source)
    if isinstance(data_set, datasets.IterableDataset):
        return max(1, data_set.num_shards)
    return max(1, min(-(-data_set.data.nbytes // part_bytes), data_set.num_rows))  # no part without a row


def data_set_rows(source: SourceConfig, part: int, parts: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, row) of the rows of one part. Raises ValueError if the data set cannot be read."""
    data_set = _open(source)
    if isinstance(data_set, datasets.IterableDataset):
        mine = data_set.shard(num_shards=parts, index=part)  # the parts are its files
    else:
        mine = data_set.shard(num_shards=parts, index=part, contiguous=True)
    where = f"{source.path}[{source.split}], part {part} of {parts}"
    rows = enumerate(rows_of(_batches(mine, source), source), start=1)
    with _quiet():
        while True:
            try:
                number, row = next(rows)
            except StopIteration:
                return
            except (*_ERRORS, pyarrow.ArrowException) as error:
                raise ValueError(
                    f"data.source.path = {source.path!r}: cannot read {where} ({error}); repair it or leave it out"
                ) from error
            yield f"{where}: row {number}", row


def _batches(data_set: "datasets.Dataset | datasets.IterableDataset", source: SourceConfig) -> Iterator[Any]:
    """Yield the record batches of a data set, with the fields of the source alone if it has them all."""
    if set(wanted := fields_of(source)) <= set(data_set.column_names or ()):
        data_set = data_set.select_columns(wanted)
    tables: Any = data_set.with_format("arrow").iter(BATCH_ROWS)
    for table in tables:
        yield from table.to_batches()


def _open(source: SourceConfig) -> "datasets.Dataset | datasets.IterableDataset":
    with _quiet():
        try:
            if source.kind == "hub":
                return datasets.load_dataset(
                    source.path, source.subset or None, split=source.split, streaming=source.streaming
                )
            loaded = datasets.load_from_disk(source.path)
        except _ERRORS as error:
            raise ValueError(
                f"data.source.path = {source.path!r}: cannot read split {source.split!r} ({error}); correct "
                "data.source.path, data.source.subset or data.source.split, or repair the data set"
            ) from error
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or source.split): loaded}
    if source.split not in splits:
        raise ValueError(
            f"data.source.split = {source.split!r}: {source.path} has the split {', '.join(map(repr, splits))}; name "
            "one of them"
        )
    return splits[source.split]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep log and progress bars of the library off the terminal; its errors are raised as well."""
    level, bars_shown = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars_shown:
            datasets.enable_progress_bars()
