"""Reading of records: good ones become documents, bad ones are counted by kind and left out."""

import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import IO, Any

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from ..config import SourceConfig
from ..format.document import BadRecord, BadRecords, Document
from .sources import InputShard

HASHED_CHARACTERS = 1 << 20
"""Number of characters of a text that are encoded and hashed at once: a copy of a long text would double its memory."""

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""A character that has no UTF-8."""

FIRST_CHECK = 1_000
"""Number of records after which each bad one checks the fraction; fewer records would say little."""


class RecordReader:
    """Reader of the documents of one input shard; `records` and `bad` count the records read so far.

    Raises ValueError if a file cannot be read or decompressed to its end, or if too many records are bad.
    """

    def __init__(self, shard: InputShard, source: SourceConfig, max_bad_fraction: float):
        self.bad = BadRecords()
        self.records = 0
        self._shard = shard
        self._source = source
        self._max_bad_fraction = max_bad_fraction

    def documents(self) -> Iterator[Document]:
        """Yield the good records as documents, in order."""
        make = _tokens if self._source.tokens_field else _text
        for number, (name, record) in enumerate(islice(self._rows(), self._source.limit_documents or None)):
            # Counted before the record is judged: `reject` takes the fraction of the records so far, this one included.
            self.records = number + 1
            content = record if isinstance(record, BadRecord) else make(record, self._source)
            if isinstance(content, BadRecord):
                self.reject(name, content)
            else:
                yield Document(number, name, *content)
        self.check()

    def reject(self, name: str, bad: BadRecord) -> None:
        """Count a bad record. Raises ValueError if too many are bad, from FIRST_CHECK records on."""
        self.bad.enter(name, bad)
        if self.records >= FIRST_CHECK:
            self.check()

    def check(self) -> None:
        """Raise ValueError if too many of the records read are bad.

        A caller that rejects documents checks at its end, as the last ones may be rejected after `documents` has ended.
        """
        self.bad.check(self.records, self._shard.source, self._max_bad_fraction)

    def _rows(self) -> Iterator[tuple[str, Any]]:
        """Yield (name, record) of every record: a parsed value, or a BadRecord."""
        match self._source.kind:
            case "hub" | "disk":
                from .data_sets import data_set_rows  # the import takes a second, which files need not spend

                yield from data_set_rows(self._source, self._shard.part, self._shard.parts)
            case kind:
                read: dict[str, Callable[[str, SourceConfig], Iterator[tuple[str, Any]]]] = {
                    "json": _json_rows,
                    "parquet": _parquet_rows,
                }
                for file in self._shard.files:
                    try:
                        yield from read.get(kind, _whole_file)(file, self._source)
                    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
                        raise ValueError(
                            f"data.source.path = {self._source.path!r}: cannot read {file} ({error}); repair it "
                            "or leave it out"
                        ) from error


def _text(record: Any, source: SourceConfig) -> tuple[str, bytes] | BadRecord:
    """Return the text of a record and its digest, or the reason for which the record is bad."""
    text = _field(record, source.text_field)
    if isinstance(text, BadRecord):
        return text
    if not isinstance(text, str):
        return BadRecord("wrong_type", f"field {source.text_field!r} is {type(text).__name__}, not str")
    if lone := LONE_SURROGATE.search(text):
        return BadRecord("invalid_utf8", f"a lone surrogate at character {lone.start()}")
    starts = range(0, len(text), HASHED_CHARACTERS)
    digest = _digest(text[start : start + HASHED_CHARACTERS].encode() for start in starts)
    return (text, digest) if text else BadRecord("empty", "")


def _tokens(record: Any, source: SourceConfig) -> tuple[NDArray[np.int64], bytes] | BadRecord:
    """Return the token ids [tokens] of a record and their digest, or the reason for which the record is bad."""
    tokens = _field(record, source.tokens_field)
    if isinstance(tokens, BadRecord):
        return tokens
    # numpy finds one type for all elements, so a single check of `dtype` replaces a check of each.
    numbers = np.array(tokens) if isinstance(tokens, list) and not any(map(np.iterable, tokens)) else np.array("")
    if numbers.size and numbers.dtype.kind not in "iu":
        return BadRecord("wrong_type", f"field {source.tokens_field!r} is not a list of integers")
    numbers = numbers.astype(np.int64)
    return (numbers, _digest([numbers.tobytes()])) if numbers.size else BadRecord("empty", "")


def _digest(parts: Iterable[bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()


def _field(record: Any, name: str) -> Any:
    if not isinstance(record, dict):
        return BadRecord("wrong_type", f"the record is {type(record).__name__}, not an object")
    if name not in record:
        return BadRecord("missing_field", f"no field {name!r} among {', '.join(map(repr, record)) or 'none'}")
    return record[name]


@contextmanager
def _open(file: str) -> Iterator[IO[bytes]]:
    """Open a file that may be compressed; reading raises OSError or EOFError at the cut of a compressed stream."""
    zst = file.endswith(".zst")
    with fsspec.open(file, "rb", compression=None if zst else "infer") as stream:
        # Arrow's zst reader reads all frames and notices a cut; those of zstandard and fsspec do neither.
        yield io.BufferedReader(pyarrow.CompressedInputStream(stream, "zstd")) if zst else stream  # type: ignore[arg-type]


def _whole_file(file: str, source: SourceConfig) -> Iterator[tuple[str, Any]]:
    with _open(file) as stream:
        text = _decoded(stream.read())
    yield file, text if isinstance(text, BadRecord) else {source.text_field: text}


def _decoded(content: bytes) -> str | BadRecord:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        return BadRecord("invalid_utf8", f"byte {error.start}")


def _json_rows(file: str, _: SourceConfig) -> Iterator[tuple[str, Any]]:
    """Yield (name, record) of JSON lines, or of one array, which is read whole, if the file begins with "["."""
    with _open(file) as stream:
        # A compressed stream cannot go back, so the first byte is put before what follows.
        first = stream.read(1)
        if first == b"[":
            yield from _array_rows(file, first + stream.read())
            return
        line = first + stream.readline()
        number = 0  # of the line, from 1; empty lines count and are no records
        while line:
            number += 1
            if not line.isspace():
                record = _parsed(line)
                line = b""  # a long one is not kept while its record is used
                yield f"{file}:{number}", record
            line = stream.readline()


def _array_rows(file: str, content: bytes) -> Iterator[tuple[str, Any]]:
    rows = _parsed(content)
    if isinstance(rows, BadRecord):
        yield file, rows
    else:
        yield from ((f"{file}:{number}", row) for number, row in enumerate(rows, start=1))


def _parsed(line: bytes) -> Any:
    text = _decoded(line)
    if isinstance(text, BadRecord):
        return text
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 4,301 digits is no JSONDecodeError
        return BadRecord("broken_json", str(error))
    return record


def _parquet_rows(file: str, source: SourceConfig) -> Iterator[tuple[str, Any]]:
    field_name = source.tokens_field or source.text_field
    with fsspec.open(file, "rb") as stream, pyarrow.parquet.ParquetFile(stream) as parquet:
        names = parquet.schema_arrow.names
        # Without the field every row is bad, and its message names the columns that exist.
        columns = [field_name] if field_name in names else names
        number = 0
        for batch in parquet.iter_batches(batch_size=1_000, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}:{number}", row
