"""Token ids of records as documents: streams are divided at EOS, and the marks around a document are removed."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..format.document import BadRecord
from ..format.tokenizer import TokenMarks

Ids = NDArray[np.int64]
NamedIds = Iterator[tuple[str, Ids | BadRecord]]


def ids_of(value: Any, field: str) -> Ids | BadRecord:
    """Return the token ids [tokens] of the value of a field, or the reason for which it holds none."""
    bad = BadRecord("wrong_type", f"field {field!r} is not a list of integers")
    if not isinstance(value, list | np.ndarray):
        return bad
    try:
        # numpy finds one type for all elements, so a single check of `dtype` replaces a check of each.
        numbers = np.asarray(value)
    except ValueError:  # lists of several lengths
        return bad
    if numbers.size and (numbers.dtype.kind not in "iu" or (isinstance(value, list) and numbers.ndim > 1)):
        return bad
    return numbers.ravel().astype(np.int64)


def documents_of(
    rows: NamedIds, holds: Literal["document", "documents", "stream"], marks: TokenMarks, *, from_start: bool = True
) -> NamedIds:
    """Yield the documents of rows of one file, as `SourceConfig.record_holds` says, or a bad record for each bad one.

    With `from_start`, EOS at the start of a stream ends no document. A bad row ends the document before it.
    """
    if holds == "stream":
        yield from _in_stream(rows, marks, from_start)
        return
    for row, ids in rows:
        if isinstance(ids, BadRecord):
            yield row, ids
        elif holds == "documents":
            yield from _in_stream(iter([(row, ids)]), marks, from_start)
        else:
            yield row, _content(ids, marks)


def _in_stream(rows: NamedIds, marks: TokenMarks, from_start: bool) -> NamedIds:
    begun: list[Ids] = []  # parts of a document that the next row continues
    name = ""  # of this document: the row in which it begins
    for row, ids in rows:
        if isinstance(ids, BadRecord):
            if begun:
                yield name, _content(np.concatenate(begun), marks)
            begun = []
            yield row, ids
            continue
        start = number = 0  # documents begun in this row
        if from_start and len(ids):
            start, from_start = int(ids[0] == marks.end), False
        for end in (start + np.flatnonzero(ids[start:] == marks.end)).tolist():
            if begun:
                yield name, _content(np.concatenate([*begun, ids[start:end]]), marks)
                begun = []
            else:
                number += 1
                yield f"{row}, document {number}", _content(ids[start:end], marks)
            start = end + 1
        if start < len(ids):
            name = name if begun else f"{row}, document {number + 1}"
            begun.append(ids[start:])
    if begun:
        yield name, _content(np.concatenate(begun), marks)


def _content(ids: Ids, marks: TokenMarks) -> Ids | BadRecord:
    """Return the ids of a document without the marks at its ends, or the reason for which it is bad."""
    start, stop = 0, len(ids)
    while start < stop and int(ids[start]) in marks.names:
        start += 1
    while start < stop and int(ids[stop - 1]) in marks.names:
        stop -= 1
    inside = ids[start:stop]
    for mark, name in marks.names.items():
        if (inside == mark).any():
            where = start + int(np.argmax(inside == mark))
            return BadRecord(
                "bad_tokens",
                f"{name!r} ({mark}) is at {where:,} of {len(ids):,} ids; if a record holds several documents, set "
                "data.source.record_holds to 'documents' or 'stream'",
            )
    return inside if len(inside) else BadRecord("empty", "")
