"""Files of token ids that are one stream of documents each: .npy, or numbers without a header.

A large file is divided into parts for processes; a document belongs to the part in which it begins.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import fsspec
import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ...config import SourceConfig
from ...format.tokenizer import TokenMarks
from .files import UnreadableError

READ_TOKENS = 1 << 20
"""Number of ids that are read at once, unless a document is longer."""

_WIDER = {2: "uint32", 4: "int64"}
"""Type of twice the size, by bytes of a number."""

_NPY_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


@dataclass(frozen=True)
class Numbers:
    """Array of `count` numbers of type `dtype` in a file, from byte `offset` on."""

    stream: IO[bytes]
    offset: int
    dtype: np.dtype
    count: int

    def read(self, start: int, stop: int) -> NDArray:
        """Return numbers [start, stop). Raises UnreadableError if the file ends before them."""
        first, size = self.offset + start * self.dtype.itemsize, (stop - start) * self.dtype.itemsize
        self.stream.seek(first)
        content = self.stream.read(size)
        if len(content) != size:
            raise UnreadableError(f"it ends at byte {first + len(content):,}, where numbers should follow")
        return np.frombuffer(content, dtype=self.dtype)


def npy_numbers(stream: IO[bytes]) -> Numbers:
    """Return the ids of an npy file, row by row if it has rows.

    Raises UnreadableError if its header is damaged, is not one of ids, or does not fit the size of the file.
    """
    try:
        shape, fortran, dtype = _NPY_HEADERS[npy.read_magic(stream)](stream)
    except Exception as error:  # numpy reads a header as Python, whose parser has errors of its own
        raise UnreadableError(f"its header is not one of an npy file: {str(error)[:80]!r}") from error
    if dtype.kind not in "iu" or (fortran and len(shape) > 1):
        raise UnreadableError(f"it holds {dtype}{' by columns' * fortran}, not token ids")
    found = Numbers(stream, stream.tell(), dtype, math.prod(shape))
    if (size := size_of(stream)) != found.offset + found.count * dtype.itemsize:
        raise UnreadableError(f"it has {size:,} bytes, and its header says {list(shape)} numbers of type {dtype}")
    return found


def stream_rows(
    file: str, source: SourceConfig, marks: TokenMarks, part: int, parts: int
) -> Iterator[tuple[str, NDArray]]:
    """Yield (name, ids [n]) of adjacent runs of one part of a stream: all documents that begin in it, whole.

    EOS at the start of the file ends no document and is left out.
    Raises UnreadableError or ValueError if the file is cut, or if no document in it ends.
    """
    with fsspec.open(file, "rb") as stream:
        ids = _stream_numbers(file, stream, source, marks)  # type: ignore[arg-type]
        first, stop = ids.count * part // parts, ids.count * (part + 1) // parts
        if first == 0 < ids.count and _next_start(ids, 0, marks.end) is None:
            raise ValueError(
                f"data.source.eos = {source.eos!r}: {file} has no token {marks.names[marks.end]} of id {marks.end}; "
                "set it to the token that ends documents, or data.source.dtype to the type of the ids"
            )
        if first > 0:
            # From the id before: if that is EOS, a document begins exactly at `first`.
            first = _next_start(ids, first - 1, marks.end) or ids.count
        elif ids.count:
            first = int(ids.read(0, 1)[0] == marks.end)
        if first >= stop:
            return  # a document that begins in an earlier part covers this one
        if stop < ids.count:
            # To the end of the document that begins last before `stop`, where the next part begins.
            stop = _next_start(ids, stop - 1, marks.end) or ids.count
        for start in range(first, stop, READ_TOKENS):
            yield f"{file}: ids from {start:,}", ids.read(start, min(start + READ_TOKENS, stop)).astype(np.int64)


def _next_start(ids: Numbers, start: int, end: int) -> int | None:
    """Return the index after the first token `end` at or after `start`; None if there is none."""
    for first in range(start, ids.count, READ_TOKENS):
        part = ids.read(first, min(first + READ_TOKENS, ids.count))
        if (part == end).any():
            return first + int(np.argmax(part == end)) + 1
    return None


def _stream_numbers(file: str, stream: IO[bytes], source: SourceConfig, marks: TokenMarks) -> Numbers:
    """Return the ids of a file. Many tools write files called .npy that have no header, as OLMo's do."""
    has_header = stream.read(len(npy.MAGIC_PREFIX)) == npy.MAGIC_PREFIX
    stream.seek(0)
    if has_header:
        return npy_numbers(stream)
    dtype = np.dtype(source.dtype or marks.dtype).newbyteorder("<")
    count, rest = divmod(size_of(stream), dtype.itemsize)
    if rest:
        raise UnreadableError(f"its size is not a multiple of the {dtype.itemsize} bytes of {dtype}")
    found = Numbers(stream, 0, dtype, count)
    sample = found.read(0, min(count, READ_TOKENS))
    if dtype.itemsize in _WIDER and len(sample) >= 64 and not sample[1::2].any():
        raise ValueError(
            f"data.source.dtype = {source.dtype!r}: {file} has no header, and every second number of {dtype} in it is "
            f"0; set it to {_WIDER[dtype.itemsize]!r}"
        )
    return found


def size_of(stream: IO[bytes]) -> int:
    """Return the size of a file in bytes; its position is then its end."""
    return stream.seek(0, os.SEEK_END)
