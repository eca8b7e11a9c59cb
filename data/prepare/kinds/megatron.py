"""Megatron's indexed data sets: token ids in a .bin, and in the .idx beside it the pieces that make documents.

The layout is that of megatron/core/datasets/indexed_dataset.py of Megatron-LM.
"""

from collections.abc import Iterator
from typing import IO, NamedTuple

import fsspec
import numpy as np
from numpy.typing import NDArray

from .files import UnreadableError
from .token_streams import READ_TOKENS, Numbers, size_of

BLOCK_DOCUMENTS = 1 << 14
"""Number of documents of an index that are read at once."""

_HEADER = np.dtype([("magic", "V9"), ("version", "<u8"), ("code", "u1"), ("pieces", "<u8"), ("bounds", "<u8")])
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Types of integers by their code; 6 and 7 are floats."""


class _Indexed(NamedTuple):
    """Ids of a .bin, and the tables of its .idx."""

    ids: Numbers

    lengths: Numbers
    """Number of ids of each piece, a sequence of Megatron's."""

    pointers: Numbers
    """First byte of each piece in the .bin."""

    bounds: Numbers
    """First piece of each document, and the number of pieces at the end."""


def megatron_rows(file: str, part: int, parts: int) -> Iterator[tuple[str, NDArray]]:
    """Yield (name, ids [n]) of the documents of one part of a .bin, as the .idx beside it divides it.

    Raises UnreadableError if one of the two is cut, or they do not belong together.
    """
    index_file = file.removesuffix(".bin") + ".idx"
    with fsspec.open(index_file, "rb") as index, fsspec.open(file, "rb") as stream:
        found = _opened(index_file, index, stream)  # type: ignore[arg-type]
        documents = found.bounds.count - 1
        last = documents * (part + 1) // parts
        for first in range(documents * part // parts, last, BLOCK_DOCUMENTS):
            starts = _starts(found, first, min(first + BLOCK_DOCUMENTS, last))
            if starts is None:
                raise UnreadableError(f"{index_file}: document {first + 1:,}, or one soon after it, is not in the .bin")
            names = (f"{file}: document {number:,}" for number in range(first + 1, last + 1))
            yield from zip(names, _adjacent(found.ids, starts), strict=False)


def _starts(found: _Indexed, first: int, last: int) -> NDArray[np.int64] | None:
    """Return the first id of documents [first, last), and the end of the last one: [last - first + 1].

    None if their pieces are not adjacent in the .bin.
    """
    bounds = found.bounds.read(first, last + 1)
    if (np.diff(bounds) < 0).any() or bounds[0] < 0 or bounds[-1] > found.lengths.count:
        return None
    lengths = found.lengths.read(bounds[0], bounds[-1]).astype(np.int64)  # [pieces]
    pointers = found.pointers.read(bounds[0], bounds[-1])  # [pieces], in bytes
    base = int(pointers[0]) // found.ids.dtype.itemsize if len(pointers) else 0
    starts = base + np.concatenate([[0], np.cumsum(lengths)])  # [pieces + 1], in ids
    adjacent = (lengths >= 0).all() and (pointers == starts[:-1] * found.ids.dtype.itemsize).all()
    return starts[bounds - bounds[0]] if adjacent and 0 <= base <= starts[-1] <= found.ids.count else None


def _adjacent(ids: Numbers, starts: NDArray[np.int64]) -> Iterator[NDArray]:
    """Yield ids [starts[i], starts[i + 1]) for each i; about READ_TOKENS are read at once."""
    first = 0
    while first < len(starts) - 1:
        within = int(np.searchsorted(starts, starts[first] + READ_TOKENS, side="right")) - 1
        last = max(within, first + 1)
        found = ids.read(int(starts[first]), int(starts[last])).astype(np.int64)
        yield from np.split(found, starts[first + 1 : last] - starts[first])
        first = last


def _opened(index_file: str, index: IO[bytes], stream: IO[bytes]) -> _Indexed:
    [header] = Numbers(index, 0, _HEADER, 1).read(0, 1)
    code, pieces, bounds = (int(header[name]) for name in ("code", "pieces", "bounds"))
    if header["magic"].tobytes() != _MAGIC or header["version"] != 1 or code not in _DTYPES:
        raise UnreadableError(f"{index_file} is not an index of version 1 of integers")
    offset, tables = _HEADER.itemsize, []
    for dtype, count in (("<i4", pieces), ("<i8", pieces), ("<i8", bounds)):  # lengths, pointers, bounds
        tables.append(Numbers(index, offset, np.dtype(dtype), count))
        offset += count * np.dtype(dtype).itemsize
    if bounds < 1 or size_of(index) != offset:
        raise UnreadableError(f"{index_file} is cut, or describes more than texts")
    dtype, size = np.dtype(_DTYPES[code]), 0
    if pieces:
        lengths, pointers, _ = tables
        size = int(pointers.read(pieces - 1, pieces)[0]) + int(lengths.read(pieces - 1, pieces)[0]) * dtype.itemsize
    if size != size_of(stream):
        raise UnreadableError(f"it has {size_of(stream):,} bytes, and {index_file} says {size:,}")
    return _Indexed(Numbers(stream, 0, dtype, size // dtype.itemsize), *tables)
