"""A file of records that another process writes, read as it grows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..records import Record, parse_record


class Tail:
    """The records of a file, each read once, without those of lines that another process has not finished.

    With `last_bytes`, only as many bytes at the end of the file are read at first.
    """

    def __init__(self, file: Path, last_bytes: int | None = None) -> None:
        self._file = file
        self._last_bytes = last_bytes
        self._inode: int | None = None
        self._offset = 0

    def read(self) -> tuple[bool, Iterator[Record]]:
        """Return whether the file was replaced or cut since the last read, and its records since then.

        A run that goes back replaces its metrics; their records then come anew. Raises OSError if the file cannot be
        read; a file that does not exist has no records.
        """
        try:
            stream = self._file.open("rb")
        except FileNotFoundError:
            gone, self._inode, self._offset = self._inode is not None, None, 0
            return gone, iter(())
        found = os.fstat(stream.fileno())
        replaced = found.st_ino != self._inode or found.st_size < self._offset  # also at the first read
        if replaced:
            self._inode = found.st_ino
            self._offset = 0 if self._last_bytes is None else max(0, found.st_size - self._last_bytes)
        return replaced, self._new_records(stream)

    def _new_records(self, stream: BinaryIO) -> Iterator[Record]:
        with stream:
            stream.seek(self._offset)
            for line in stream:
                if not line.endswith(b"\n"):  # `_offset` stays before it: the next read takes it whole
                    break
                self._offset += len(line)
                record = parse_record(line)  # None for the rest of a line in whose middle `last_bytes` begins
                if record is not None:
                    yield record
