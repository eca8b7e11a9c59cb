"""Several documents in a sequence: best-fit packing, and concat-and-chunk.

A row of L pairs is stored as L + 1 tokens, inputs [:-1] and targets [1:]. Where one document ends and another begins,
one token is both the target that ends the first and the input that begins the second, and documents end and begin
with the boundary token B; so a row keeps every target if each of its segments begins with B as input and only the
last one ends before its document does. A segment that begins inside a document is therefore given B in place of the
token before it, which another row has as a target.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..format.document import NO_DOCUMENT

POOL_SEQUENCES = 4_096
"""Sequences' worth of segments that are packed together. Best fit leaves few gaps in so many, and 4,096 sequences of
256 tokens are 2 MB."""

POOL_TOKENS = 1 << 22
"""Most tokens of a pool, unless one sequence is longer."""


class Segment(NamedTuple):
    """Adjacent pairs of one document, `offset` the first: `tokens` [pairs + 1], their inputs and the last target."""

    tokens: NDArray
    document: int
    offset: int

    @property
    def pairs(self) -> int:
        """Number of (input, target) pairs."""
        return len(self.tokens) - 1

    def cut(self, pairs: int) -> tuple["Segment", "Segment"]:
        """Divide after `pairs` pairs."""
        return (
            Segment(self.tokens[: pairs + 1], self.document, self.offset),
            Segment(self.tokens[pairs:], self.document, self.offset + pairs),
        )


class Row(NamedTuple):
    """One sequence: `tokens` [length + 1], and its segments, whose pairs add up to `length`."""

    tokens: NDArray
    segments: list[Segment]


class BestFitPacker:
    """Rows of `length` pairs from segments of at most as many, by best-fit decreasing (arXiv 2404.10830).

    A pool of segments, the longest first, goes each into the fullest row that still has room for it. Rows left with
    room are then filled by dissolving the emptiest ones and cutting their segments, so that no row is padded and
    nothing is dropped; only `finish` fills the very last row with boundaries, `filler` pairs that came from no
    document.
    """

    def __init__(self, length: int, boundary_id: int):
        self.filler = 0
        self._length = length
        self._boundary_id = boundary_id
        self._pool: list[Segment] = []
        self._pool_pairs = 0
        self._pool_limit = max(length, min(POOL_SEQUENCES * length, POOL_TOKENS))

    def add(self, segment: Segment) -> Iterator[Row]:
        """Take a segment, and give rows whenever a pool is full."""
        assert 0 < segment.pairs <= self._length, f"{segment.pairs} pairs for rows of {self._length}"
        # A view would keep its whole document in memory.
        self._keep(segment._replace(tokens=segment.tokens.copy()))
        if self._pool_pairs >= self._pool_limit:
            yield from self._packed()

    def finish(self) -> Iterator[Row]:
        """Give all that is left."""
        yield from self._packed()
        if self._pool:
            self.filler += self._length - self._pool_pairs
            tokens = np.full(self._length - self._pool_pairs + 1, self._boundary_id, self._pool[0].tokens.dtype)
            segments, self._pool = [*self._pool, Segment(tokens, NO_DOCUMENT, 0)], []
            yield self._row(segments)

    def _keep(self, segment: Segment) -> None:
        self._pool.append(segment)
        self._pool_pairs += segment.pairs

    def _packed(self) -> Iterator[Row]:
        """Give every whole row of the pool; what stays in it is shorter than one."""
        rows = best_fit([segment.pairs for segment in self._pool], self._length)
        filled = [[self._pool[index] for index in row] for row in rows]
        self._pool, self._pool_pairs = [], 0
        # Fullest first; of equal ones the earlier made, so that equal input gives equal rows.
        filled.sort(key=lambda row: -sum(segment.pairs for segment in row))
        loose: list[Segment] = []
        first, last = 0, len(filled) - 1
        while first <= last:
            row = filled[first]
            room = self._length - sum(segment.pairs for segment in row)
            while room and (loose or last > first):
                if not loose:
                    loose, last = filled[last][::-1], last - 1
                segment = loose.pop()
                if segment.pairs > room:
                    segment, rest = segment.cut(room)
                    loose.append(rest)
                row.append(segment)
                room -= segment.pairs
            if room:
                loose = row
                break
            yield self._row(row)
            first += 1
        for segment in loose:
            self._keep(segment)

    def _row(self, segments: list[Segment]) -> Row:
        # Every segment's first input stays B.
        tokens = np.full(self._length + 1, self._boundary_id, dtype=segments[0].tokens.dtype)
        # A segment cut before its document's end has no B after it: it goes last, where its target has a place.
        whole = [segment for segment in segments if segment.tokens[-1] == self._boundary_id]
        cut = [segment for segment in segments if segment.tokens[-1] != self._boundary_id]
        assert len(cut) <= 1, "a row holds one cut segment at most"
        start = 0
        for segment in [*whole, *cut]:
            tokens[start + 1 : start + len(segment.tokens)] = segment.tokens[1:]
            start += segment.pairs
        return Row(tokens, [*whole, *cut])


def best_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """Return the items (numbers in `sizes`) of each bin by best-fit decreasing: the fullest bin with room, else a new.

    Equal sizes keep their order; of equally full bins the one that became so last is taken.
    """
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = defaultdict(list)
    # Bit r is set while some bin has room r: the fullest bin with room for a size is the lowest bit from there on.
    rooms = 0
    for item in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        size = sizes[item]
        above = rooms >> size
        if above:
            room = size + (above & -above).bit_length() - 1
            chosen = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            bins[chosen].append(item)
        else:
            chosen, room = len(bins), capacity
            bins.append([item])
        if room > size:
            by_room[room - size].append(chosen)
            rooms |= 1 << (room - size)
    return bins


class Concatenator:
    """Rows of `length` pairs cut from all documents' pairs laid end to end: concat-and-chunk.

    A document goes on in the next row with the token before as its input. What does not fill a last row is left over.
    """

    def __init__(self, length: int):
        self._length = length
        self._segments: list[Segment] = []
        self._pairs = 0

    @property
    def left_over(self) -> list[Segment]:
        """Segments that have not filled a row."""
        return self._segments

    def add(self, segment: Segment) -> Iterator[Row]:
        """Take a whole document, of any length, and give the rows it fills."""
        while segment.pairs >= (room := self._length - self._pairs):
            head, segment = segment.cut(room)
            segments, self._segments, self._pairs = [*self._segments, head], [], 0
            yield Row(np.concatenate([*(part.tokens[:-1] for part in segments), head.tokens[-1:]]), segments)
            if not segment.pairs:
                return
        self._segments.append(segment._replace(tokens=segment.tokens.copy()))
        self._pairs += segment.pairs
