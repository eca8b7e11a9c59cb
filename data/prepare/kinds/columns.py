"""Parquet and Arrow files, and the rows of Arrow's tables."""

import os
from collections.abc import Iterable, Iterator
from typing import IO, Any

import fsspec
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pyarrow.types

from ...config import SourceConfig
from ...format.document import BadRecord
from .files import UnreadableError, decoded, opened

BATCH_ROWS = 1_000

_ARROW_FILE = b"ARROW1"
_ARE_LISTS = pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_fixed_size_list
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def parquet_rows(file: str, source: SourceConfig) -> Iterator[tuple[str, Any]]:
    """Yield (name, record) of the rows of a parquet file."""
    with fsspec.open(file, "rb") as stream, pyarrow.parquet.ParquetFile(stream) as parquet:
        names = parquet.schema_arrow.names
        # Without a field every row is bad, and its message names the columns that exist.
        columns = wanted if set(wanted := fields_of(source)) <= set(names) else names
        batches = parquet.iter_batches(batch_size=BATCH_ROWS, columns=columns)
        yield from _named(file, rows_of(batches, source))


def arrow_rows(file: str, source: SourceConfig) -> Iterator[tuple[str, Any]]:
    """Yield (name, record) of the rows of an Arrow IPC file, with or without its index (stream).

    Raises UnreadableError if a stream lacks its end: it would be read as a shorter one.
    """
    with opened(file) as stream:
        if stream.peek(len(_ARROW_FILE)).startswith(_ARROW_FILE):
            reader = pyarrow.ipc.open_file(stream)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            _check_end(stream)
            batches = pyarrow.ipc.open_stream(stream)
        yield from _named(file, rows_of(batches, source))


def _check_end(stream: IO[bytes]) -> None:
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(size - len(_END_OF_STREAM), 0))
    if stream.read() != _END_OF_STREAM:
        raise UnreadableError("an Arrow stream without its end")
    stream.seek(0)


def _named(file: str, rows: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{file}:{number}", row) for number, row in enumerate(rows, start=1))


def fields_of(source: SourceConfig) -> list[str]:
    """Return the names of the fields that a source is read for: the content, and the score if it has one."""
    content = source.tokens_field or source.text_field
    return list(dict.fromkeys([content, *([source.score_field] if source.score_field else [])]))


def rows_of(batches: Iterable[pyarrow.RecordBatch], source: SourceConfig) -> Iterator[Any]:
    """Yield the records of Arrow batches, with the fields of the source alone if they have them all.

    Lists of numbers become arrays. A text that is no UTF-8 is a bad record.
    """
    wanted = fields_of(source)
    for batch in batches:
        if set(wanted) <= set(batch.schema.names):
            for values in zip(*(_values(batch.column(name)) for name in wanted), strict=True):
                bad = next((value for value in values if isinstance(value, BadRecord)), None)
                yield bad or dict(zip(wanted, values, strict=True))
        else:
            yield from batch.to_pylist()


def _values(column: pyarrow.Array) -> Iterable[Any]:
    # Lists become arrays, without an object for each number. With a null among them numpy would make them floats.
    if any(is_one(column.type) for is_one in _ARE_LISTS) and not column.null_count + column.flatten().null_count:
        return column.to_numpy(zero_copy_only=False)
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        contents = column.cast(pyarrow.large_binary()).to_pylist()  # to decode one by one
        return (content if content is None else decoded(content) for content in contents)
