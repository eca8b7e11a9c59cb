"""Reading of records: good ones become documents, bad ones are counted by kind and left out."""

import hashlib
import math
import tarfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import numpy as np
import pyarrow
from numpy.typing import NDArray

from ..config import SourceConfig
from ..format.document import BadRecord, BadRecords, Document
from ..format.tokenizer import TokenMarks
from .kinds.columns import arrow_rows, parquet_rows
from .kinds.files import UnreadableError
from .kinds.megatron import megatron_rows
from .kinds.samples import tar_rows
from .kinds.text import csv_rows, json_rows, whole_file
from .kinds.token_streams import stream_rows
from .sources import InputShard
from .token_documents import documents_of, ids_of

Content = str | NDArray[np.int64]
"""Text, or token ids [tokens]."""

HASHED_CHARACTERS = 1 << 20
"""Number of characters of a text that are encoded and hashed at once: a copy of a long text would double its memory."""

FIRST_CHECK = 1_000
"""Number of records after which each bad one checks the fraction; fewer records would say little."""

_READERS: dict[str, Callable[[str, SourceConfig], Iterator[tuple[str, Any]]]] = {
    "python_stdlib": whole_file,
    "text": whole_file,
    "json": json_rows,
    "csv": csv_rows,
    "parquet": parquet_rows,
    "arrow": arrow_rows,
    "webdataset": tar_rows,
}
"""Readers of files with records, by kind of the source."""

_UNREADABLE = (OSError, EOFError, zlib.error, pyarrow.ArrowException, tarfile.TarError, UnreadableError)
"""Errors of a file that is cut, damaged, or of another kind."""


class RecordReader:
    """Reader of the documents of one input shard; `records` and `bad` count the records read so far.

    `marks` are those of token ids, and None for text. Raises ValueError if a file cannot be read or decompressed to its
    end, or if too many records are bad.
    """

    def __init__(
        self, shard: InputShard, source: SourceConfig, max_bad_fraction: float, marks: TokenMarks | None = None
    ):
        self.bad = BadRecords()
        self.records = 0
        self._read = 0  # records of all bins
        self._shard = shard
        self._source = source
        self._max_bad_fraction = max_bad_fraction
        self._marks = marks

    def documents(self) -> Iterator[Document]:
        """Yield the good records as documents, in order."""
        found = (one for rows in self._files() for one in self._scored(rows))
        for name, content, score in islice(found, self._source.limit_documents or None):
            self._read += 1
            if self._bin(score) != self._shard.bin:
                continue  # another input shard reads the same files for it
            # Counted before the record is judged: `reject` takes the fraction of the records so far, this one included.
            self.records += 1
            if isinstance(content, BadRecord):
                self.reject(name, content)
            elif isinstance(digest := digest_of(content), BadRecord):
                self.reject(name, digest)
            else:
                yield Document(self.records - 1, name, content, digest, score or 0.0)
        self.check()

    def _bin(self, score: float | None) -> int | None:
        """Return the score bin of a record; a record without a score is a bad record of the lowest bin."""
        if self._shard.bin is None:
            return None
        return 0 if score is None else bisect_right(self._source.score_edges, score)

    def reject(self, name: str, bad: BadRecord) -> None:
        """Count a bad record. Raises ValueError if too many are bad, from FIRST_CHECK records on."""
        self.bad.enter(name, bad)
        if self._read >= FIRST_CHECK:
            self.check()

    def check(self) -> None:
        """Raise ValueError if too many of the records read are bad.

        A caller that rejects documents checks at its end, as the last ones may be rejected after `documents` has ended.
        """
        # The records of other bins count: bad ones without a score would be many among those of the lowest alone.
        self.bad.check(self._read, self._shard.source, self._max_bad_fraction)

    def _scored(self, rows: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Content | BadRecord, float | None]]:
        """Yield (name, content, score) of each document of the rows of one file; the content may be a bad record."""
        if not self._source.score_field:
            yield from ((name, content, None) for name, content in self._contents(rows))
            return
        for name, record in rows:
            score = _score(record, self._source)
            if isinstance(score, BadRecord):
                yield name, score, None
            else:
                yield from ((*found, score) for found in self._contents(iter([(name, record)])))

    def _contents(self, rows: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Content | BadRecord]]:
        """Yield (name, content) of each document of the rows of one file, good or bad."""
        source = self._source
        if not source.holds_tokens:
            return ((name, _text(record, source)) for name, record in rows)
        assert self._marks is not None, "a source of token ids comes with its tokenizer"
        if source.kind == "tokens":
            # `stream_rows` has left out EOS at the start of the file already; a part begins with a document.
            return documents_of(rows, "stream", self._marks, from_start=False)
        ids = ((name, _ids(record, source)) for name, record in rows)
        return documents_of(ids, source.record_holds, self._marks)

    def _files(self) -> Iterator[Iterator[tuple[str, Any]]]:
        """Yield the rows of each file, or of the part of a data set: (name, record)."""
        source, shard = self._source, self._shard
        if source.kind in ("hub", "disk"):
            from .kinds.data_sets import data_set_rows  # the import takes a second, which files need not spend

            yield data_set_rows(source, shard.part, shard.parts)
        for file in shard.files:
            yield self._readable(file, self._rows(file))

    def _rows(self, file: str) -> Iterator[tuple[str, Any]]:
        source, shard = self._source, self._shard
        if source.kind == "megatron":
            return megatron_rows(file, shard.part, shard.parts)
        if source.kind == "tokens":
            assert self._marks is not None, "a source of token ids comes with its tokenizer"
            return stream_rows(file, source, self._marks, shard.part, shard.parts)
        return _READERS[source.kind](file, source)

    def _readable(self, file: str, rows: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        try:
            yield from rows
        except _UNREADABLE as error:
            raise ValueError(
                f"data.source.path = {self._source.path!r}: cannot read {file} ({error}); repair it or leave it out"
            ) from error


def _score(record: Any, source: SourceConfig) -> float | BadRecord:
    """Return the score of a record, or the reason for which it has none; the values of CSV are texts."""
    value = _field(record, source.score_field)
    if isinstance(value, BadRecord):
        return value
    with suppress(ValueError, OverflowError):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if (is_number or (isinstance(value, str) and source.kind == "csv")) and math.isfinite(score := float(value)):
            return score
    return BadRecord("wrong_type", f"field {source.score_field!r} is {type(value).__name__}, not a finite number")


def _text(record: Any, source: SourceConfig) -> str | BadRecord:
    """Return the text of a record, or the reason for which the record is bad."""
    text = _field(record, source.text_field)
    if isinstance(text, BadRecord):
        return text
    if not isinstance(text, str):
        return BadRecord("wrong_type", f"field {source.text_field!r} is {type(text).__name__}, not str")
    return text or BadRecord("empty", "")


def _ids(record: Any, source: SourceConfig) -> NDArray[np.int64] | BadRecord:
    """Return the token ids [tokens] of a record, or the reason for which the record is bad."""
    ids = record if isinstance(record, np.ndarray) else _field(record, source.tokens_field)
    return ids if isinstance(ids, BadRecord) else ids_of(ids, source.tokens_field)


def _field(record: Any, name: str) -> Any:
    if isinstance(record, BadRecord):
        return record
    if not isinstance(record, dict):
        return BadRecord("wrong_type", f"the record is {type(record).__name__}, not an object")
    if name not in record:
        return BadRecord("missing_field", f"no field {name!r} among {', '.join(map(repr, record)) or 'none'}")
    return record[name]


def digest_of(content: Content) -> bytes | BadRecord:
    """Return the BLAKE2b hash of a text or of token ids, 16 bytes; a text with a character that has no UTF-8 is bad."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(content, np.ndarray):
        digest.update(content.tobytes())
        return digest.digest()
    for start in range(0, len(content), HASHED_CHARACTERS):
        try:
            digest.update(content[start : start + HASHED_CHARACTERS].encode())
        except UnicodeEncodeError as error:
            return BadRecord("invalid_utf8", f"a lone surrogate at character {start + error.start}")
    return digest.digest()
