"""Several documents in a sequence: best-fit packing, and concat-and-chunk.

A row of L pairs is stored as L + 1 tokens, inputs [:-1] and targets [1:]. Where one document ends and another begins,
a single token is the last target of the first and the first input of the second: the boundary token B, with which
documents begin and end. A row therefore keeps every target if each of its segments has B as its first input and only
its last segment ends before its document does. A segment that begins inside a document gets B instead of the token
before it, which is a target in another row.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..format.document import NO_DOCUMENT

POOL_SEQUENCES = 4_096
"""Number of sequences that are packed together: best fit leaves few gaps among 4,096, which are 2 MB at 256 tokens."""

POOL_TOKENS = 1 << 22
"""Maximum number of tokens of a pool, unless one sequence is longer."""


class Segment(NamedTuple):
    """Adjacent pairs of document number `document`, from its pair `offset` on, as `tokens` [pairs + 1]."""

    tokens: NDArray
    document: int
    offset: int

    @property
    def pairs(self) -> int:
        """Number of (input, target) pairs."""
        return len(self.tokens) - 1

    def cut(self, pairs: int) -> tuple["Segment", "Segment"]:
        """Return the first `pairs` pairs and the rest; the token at the cut is in both."""
        return (
            Segment(self.tokens[: pairs + 1], self.document, self.offset),
            Segment(self.tokens[pairs:], self.document, self.offset + pairs),
        )


class Row(NamedTuple):
    """One sequence: `tokens` [length + 1], and its segments in order, whose pairs sum to `length`."""

    tokens: NDArray
    segments: list[Segment]


class BestFitPacker:
    """Packer of segments into rows of `length` pairs, by best-fit decreasing (arXiv 2404.10830).

    Each segment of a pool, longest first, goes into the fullest row that has room for it. The rows that still have room
    are filled with the segments, cut if necessary, of the emptiest rows, so that no row is padded and nothing is
    dropped. Only `finish` fills the last row with boundaries: `filler` pairs that belong to no document.
    """

    def __init__(self, length: int, boundary_id: int):
        self.filler = 0
        self._length = length
        self._boundary_id = boundary_id
        self._pool: list[Segment] = []
        self._pool_pairs = 0
        self._pool_limit = max(length, min(POOL_SEQUENCES * length, POOL_TOKENS))

    def add(self, segment: Segment) -> Iterator[Row]:
        """Add a segment of at most `length` pairs; yield the rows of the pool if it is full."""
        assert 0 < segment.pairs <= self._length, f"{segment.pairs} pairs for rows of {self._length}"
        # A view would keep the whole document in memory.
        self._keep(segment._replace(tokens=segment.tokens.copy()))
        if self._pool_pairs >= self._pool_limit:
            yield from self._packed()

    def finish(self) -> Iterator[Row]:
        """Yield all remaining rows, the last one filled with boundaries."""
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
        """Yield the full rows of the pool, in which fewer pairs than one row remain."""
        rows = best_fit([segment.pairs for segment in self._pool], self._length)
        filled = [[self._pool[index] for index in row] for row in rows]
        self._pool, self._pool_pairs = [], 0
        # Fullest first. The sort is stable, so that equal input gives equal rows.
        filled.sort(key=lambda row: -sum(segment.pairs for segment in row))
        loose: list[Segment] = []
        # Invariant: rows [first, last] are whole, the rows after them are dissolved, and `loose` holds the segments of
        # dissolved rows that no row has taken yet.
        first, last = 0, len(filled) - 1
        while first <= last:
            row = filled[first]
            room = self._length - sum(segment.pairs for segment in row)
            while room and (loose or last > first):
                if not loose:
                    # Take the emptiest row apart, reversed so that pop() returns its segments in order.
                    loose, last = filled[last][::-1], last - 1
                segment = loose.pop()
                if segment.pairs > room:
                    segment, rest = segment.cut(room)
                    loose.append(rest)
                row.append(segment)
                room -= segment.pairs
            if room:
                loose = row  # no row is left to fill it from: its segments wait for the next pool
                break
            yield self._row(row)
            first += 1
        for segment in loose:
            self._keep(segment)

    def _row(self, segments: list[Segment]) -> Row:
        # The first input of every segment stays B.
        tokens = np.full(self._length + 1, self._boundary_id, dtype=segments[0].tokens.dtype)
        # A segment cut before the end of its document does not end with B, so it goes last, where no B must follow.
        whole = [segment for segment in segments if segment.tokens[-1] == self._boundary_id]
        cut = [segment for segment in segments if segment.tokens[-1] != self._boundary_id]
        assert len(cut) <= 1, "a row holds one cut segment at most"
        start = 0
        for segment in [*whole, *cut]:
            tokens[start + 1 : start + len(segment.tokens)] = segment.tokens[1:]
            start += segment.pairs
        return Row(tokens, [*whole, *cut])


def best_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """Return the items (indices into `sizes`) of each bin of `capacity`, by best-fit decreasing.

    Each item, largest first, goes into the fullest bin that has room, or into a new one. Equal sizes keep their order;
    of equally full bins the one that reached its level last is taken.
    """
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = defaultdict(list)
    # Bit r is set while a bin has room r, so the fullest bin with room for a size is the lowest bit from `size` on.
    rooms = 0
    for item in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        size = sizes[item]
        above = rooms >> size
        if above:
            # `above & -above` isolates the lowest bit: the least room that suffices.
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
    """Concat-and-chunk: the pairs of all documents, end to end, cut into rows of `length` pairs.

    A document continues in the next row with its previous token as the first input. The pairs that do not fill a last
    row are left over.
    """

    def __init__(self, length: int):
        self._length = length
        self._segments: list[Segment] = []
        self._pairs = 0

    @property
    def left_over(self) -> list[Segment]:
        """Segments that do not fill a row."""
        return self._segments

    def add(self, segment: Segment) -> Iterator[Row]:
        """Add a whole document, of any length; yield the rows that it fills."""
        while segment.pairs >= (room := self._length - self._pairs):
            head, segment = segment.cut(room)
            segments, self._segments, self._pairs = [*self._segments, head], [], 0
            # The last token of a segment equals the first of the next, so only the row's last segment keeps it.
            yield Row(np.concatenate([*(part.tokens[:-1] for part in segments), head.tokens[-1:]]), segments)
            if not segment.pairs:
                return
        self._segments.append(segment._replace(tokens=segment.tokens.copy()))  # not a view, as in BestFitPacker
        self._pairs += segment.pairs
