"""Records of a run: files of one JSON object a line, some of whose lines a crash or a bad disk may have damaged.

No run stops for a log: lines without a record are named and put aside, and all others stay.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..data.files import read_patiently, sync, write_whole
from ..data.lock import now
from .redact import redact_all

Record = dict[str, Any]
LARGEST = 1e300
"""Bound of the numbers of a record: larger ones are no measurements, and sums of them could be infinite."""


def append_record(file: Path, record: Record) -> None:
    """Append a record with the time and without its secrets, on its own line even if the last one was cut short."""
    with file.open("ab+") as stream:
        if stream.tell():  # opened at its end
            stream.seek(-1, 2)  # to the last byte
            if stream.read(1) != b"\n":
                stream.write(b"\n")
        stream.write(json.dumps(redact_all({"time": now(), **record})).encode() + b"\n")


def read_records(file: Path) -> list[Record]:
    """Return the records of `file`, in order, without the lines that hold none. A file that does not exist has none.

    Raises OSError if the file cannot be read.
    """
    return [record for _, record in parsed_lines(file) if record is not None]


def keep_records(file: Path, wanted: Callable[[Record], bool]) -> None:
    """Remove the records that are not wanted, and lines that hold none."""
    lines = parsed_lines(file)
    kept = [line for line, record in lines if record is not None and wanted(record)]
    if len(kept) < len(lines):
        _write_lines(file, kept)


def put_bad_lines_aside(file: Path) -> str | None:
    """Move the lines that hold no record into `FILE.damaged`; return a sentence that names them, or None.

    A last line without its end, which a crash leaves, is removed without a word.
    """
    lines = parsed_lines(file)
    bad = [number for number, (_, record) in enumerate(lines) if record is None]
    if not bad:
        return None
    if bad[-1] == len(lines) - 1 and not lines[-1][0].endswith(b"\n"):
        bad.pop()
    aside = file.with_name(f"{file.name}.damaged")
    if bad:
        with aside.open("ab") as stream:
            stream.writelines(lines[number][0] for number in bad)
        sync(aside)  # before they leave `file`: on a full disk both files keep them
    _write_lines(file, [line for line, record in lines if record is not None])
    if not bad:
        return None
    numbers = ", ".join(str(number + 1) for number in bad[:8]) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
    return f"{file}: line{'s' * (len(bad) > 1)} {numbers} held no record: moved to {aside.name}"


def parsed_lines(file: Path) -> list[tuple[bytes, Record | None]]:
    """Return every line of `file` with its record, or with None if it holds none."""
    content = read_patiently(file, lambda: file.read_bytes() if file.exists() else b"")
    return [(line, parse_record(line)) for line in content.splitlines(keepends=True)]


def parse_record(line: bytes) -> Record | None:
    """Return the record of a line, or None if it holds none."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _write_lines(file: Path, lines: list[bytes]) -> None:
    """Replace the lines of `file`, each with its end."""
    # The last line may lack its end.
    write_whole(file, lambda begun: begun.write_bytes(b"".join(line.rstrip(b"\n") + b"\n" for line in lines)))


def numbers_of(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield name and value of every finite number of a record; tables within it join their names by `/`."""
    for key, value in record.items():
        if type(value) is int or type(value) is float:  # and not bool, which is an int
            if -LARGEST < value < LARGEST:  # false for NaN
                yield prefix + key, value
        elif type(value) is dict:
            yield from numbers_of(value, f"{prefix}{key}/")
