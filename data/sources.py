"""Documents, one after another, through Hugging Face `datasets`: streamed, so memory stays flat and nothing is cached.

The order is the source's own: files sorted by path, rows as they stand. A document's number is its place in it.
"""

import glob
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

from .config import SourceConfig

SUFFIXES = {
    "text": ("",),
    "json": (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst"),
    "parquet": (".parquet",),
}
"""Endings of the files that a directory is searched for."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document: its number in the source's order, where it came from, its text."""

    number: int
    name: str
    text: str


def documents(config: SourceConfig) -> Iterator[Document]:
    """Yield the source's documents.

    Raises ValueError, naming the file and the way out, for a path that matches nothing, an unreadable file, a missing
    text column or a text that is not a string.
    """
    with _quiet_datasets():
        match config.kind:
            case "python_stdlib":
                rows = _whole_files(_standard_library())
            case "text":
                rows = _whole_files(_matching_files(config))
            case "json" | "parquet":
                rows = (row for file in _matching_files(config) for row in _file_rows(config, file))
            case "hub":
                rows = _hub_rows(config)
        for number, (name, text) in enumerate(islice(rows, config.limit_documents or None)):
            yield Document(number, name, text)


@contextmanager
def _quiet_datasets() -> Iterator[None]:
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


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    installed = {"site-packages", "dist-packages"}
    return sorted(file for file in root.rglob("*.py") if installed.isdisjoint(file.relative_to(root).parts))


def _matching_files(config: SourceConfig) -> list[Path]:
    """Return the sorted files that a file's, a directory's or a glob's path means; hidden ones only if named."""
    path = Path(config.path)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.name.endswith(SUFFIXES[config.kind])]
        files = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    else:
        # Unlike Path.glob, this takes an absolute pattern.
        files = [Path(name) for name in glob.glob(config.path, recursive=True)]  # noqa: PTH207
    files = sorted(file for file in files if file.is_file())
    if not files:
        endings = " or ".join(ending for ending in SUFFIXES[config.kind] if ending)
        raise ValueError(
            f"data.source.path = {config.path!r} matches no file; name a file, a glob, or a directory with "
            f"{endings or 'text'} files"
        )
    return files


def _whole_files(files: list[Path]) -> Iterator[tuple[str, str]]:
    """Yield each file's name and content; bytes that are not UTF-8 become U+FFFD, "\\r\\n" becomes "\\n"."""
    options = {"sample_by": "document", "encoding_errors": "replace"}
    for file, row in zip(files, _rows("the files", "text", data_files=_literal(files), **options), strict=True):
        yield str(file), row["text"]


def _file_rows(config: SourceConfig, file: Path) -> Iterator[tuple[str, str]]:
    """Yield the rows of one JSON or parquet file; one data set a file, so that an error can name it."""
    rows = _rows(str(file), config.kind, data_files=_literal([file]), column=config.text_field)
    return _texts(rows, str(file), config.text_field)


def _hub_rows(config: SourceConfig) -> Iterator[tuple[str, str]]:
    where = f"data set {config.path!r}, split {config.split!r}"
    rows = _rows(where, config.path, config.subset or None, split=config.split, column=config.text_field)
    return _texts(rows, config.path, config.text_field)


def _literal(files: list[Path]) -> list[str]:
    # `datasets` takes names for patterns: unescaped, a file called "a[1].txt" would be left out without a word.
    return [glob.escape(str(file)) for file in files]


def _rows(
    where: str, name: str, subset: str | None = None, *, split: str = "train", column: str = "", **options: Any
) -> Iterator[dict[str, Any]]:
    """Stream a data set's rows, with `column` alone if it is known to be there; whatever goes wrong names `where`."""
    try:
        stream = datasets.load_dataset(name, subset, split=split, streaming=True, **options)
        if column in (stream.column_names or ()):
            stream = stream.select_columns([column])
        yield from stream
    except StopIteration:  # the JSON reader's word for an empty file
        return
    except Exception as error:
        raise ValueError(f"data.source: cannot read {where}: {error}; repair it or leave it out") from error


def _texts(rows: Iterator[dict[str, Any]], name: str, field: str) -> Iterator[tuple[str, str]]:
    """Yield (name and row number, text) of every row."""
    for number, row in enumerate(rows, start=1):
        if field not in row:
            raise ValueError(
                f"data.source: {name} has no field {field!r}; set data.source.text_field to one of "
                f"{', '.join(map(repr, row))}"
            )
        if not isinstance(row[field], str):
            raise ValueError(
                f"data.source: {name}, row {number}: field {field!r} is {type(row[field]).__name__}, not str; "
                "set data.source.text_field to a text column, or repair the row"
            )
        yield f"{name}:{number}", row[field]
