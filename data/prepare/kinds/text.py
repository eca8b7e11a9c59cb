"""Files of text: one document each, JSON lines and arrays, CSV."""

import csv
import io
import json
import sys
from collections.abc import Iterator
from typing import Any

from ...config import SourceConfig
from ...format.document import BadRecord
from .files import decoded, opened_text

csv.field_size_limit(sys.maxsize)  # the default refuses texts of more than 131,072 characters


def whole_file(file: str, source: SourceConfig) -> Iterator[tuple[str, Any]]:
    """Yield the one record of a file whose content is a text."""
    with opened_text(file) as stream:
        text = decoded(stream.read())
    yield file, text if isinstance(text, BadRecord) else {source.text_field: text}


def json_rows(file: str, _: SourceConfig) -> Iterator[tuple[str, Any]]:
    """Yield (name, record) of JSON lines, or of one array, which is read whole, if the file begins with "["."""
    with opened_text(file) as stream:
        if stream.peek(1).startswith(b"["):
            yield from _array_rows(file, stream.read())
            return
        number = 0  # of the line, from 1; empty lines count and are no records
        while line := stream.readline():
            number += 1
            if not line.isspace():
                record = parsed(line)
                line = b""  # a long one is not kept while its record is used
                yield f"{file}:{number}", record


def _array_rows(file: str, content: bytes) -> Iterator[tuple[str, Any]]:
    rows = parsed(content)
    if isinstance(rows, BadRecord):
        yield file, rows
    else:
        yield from ((f"{file}:{number}", row) for number, row in enumerate(rows, start=1))


def parsed(content: bytes) -> Any:
    """Return the value of a text in JSON, or the reason why it has none."""
    text = decoded(content)
    if isinstance(text, BadRecord):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 4,301 digits is no JSONDecodeError
        return BadRecord("broken_json", str(error))


def csv_rows(file: str, _: SourceConfig) -> Iterator[tuple[str, Any]]:
    """Yield (name, record) of the rows below the header of a CSV file, or of a TSV file by its name.

    Values follow RFC 4180: in double quotes they may hold separators and line breaks. Empty lines are no records.
    """
    with opened_text(file) as stream:
        # A byte that is no UTF-8 becomes a lone surrogate, which makes bad records of the texts that hold it.
        lines = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
        rows = csv.reader(lines, delimiter="\t" if ".tsv" in file else ",", strict=True)
        header: list[str] = []
        while True:
            name = f"{file}:{rows.line_num + 1}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield name, BadRecord("broken_csv", str(error))
                continue
            if not header:
                header = row
            elif len(row) == len(header):
                yield name, dict(zip(header, row, strict=True))
            elif row:
                yield name, BadRecord("broken_csv", f"{len(row)} values for {len(header)} columns")
