"""Visibility between shares in closed form: rows of a share that others need, and the number of visible pairs.

The rules are those of `kernels.mask`: same document, no key after its query if causal, fewer than `window` tokens
before it. They are applied to whole pieces of documents on the host, so the cost does not grow with the number of
tokens, and to many pieces and shares at once, so that 1,024 ranks are planned in seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...kernels.layout import SeqLayout
from .rows import Rows

Side = Literal["queries", "keys"]
Ints = NDArray[np.int64]

FAR = 2**40
"""A position that no context reaches; 2^20 of them fit into an integer."""
NONE = np.array([FAR, 0])
"""An empty range of rows: the neutral element of `hull`."""
PAIRS_AT_ONCE = 2**20
"""Number of pairs of pieces that are counted at once."""
GAP = 128
"""Runs of rows with at most this many rows between them travel as one run. A row in the gap costs the link its bytes, 2
KB for 4 kv heads of 128 in 16 bit; a further run costs the host one more view in each layer. 128 rows take 5 us on a
port of 50 GB/s."""


@dataclass(frozen=True)
class Visibility:
    """Mask rules besides documents: causal order, and the attention window, which counts the query itself.

    Raises ValueError for an attention window below 1, or one without causal order.
    """

    causal: bool = True
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and not (self.causal and self.window >= 1):
            raise ValueError(
                f"window = {self.window} with causal = {self.causal}: an attention window needs causal = True and at "
                "least 1 token"
            )


@dataclass(frozen=True, eq=False)
class Pieces:
    """Pieces of documents that the shares of one context hold, in order of owner and position: arrays `[pieces]`."""

    owner: Ints
    """Number of the share."""
    start: Ints
    """First position."""
    stop: Ints
    """Position after the last."""
    row: Ints
    """Row of the share at which the piece begins."""
    document: Ints
    """Number of the document."""
    first: Ints
    """First position of the document."""
    last: Ints
    """Position after the last of the document."""

    @classmethod
    def of(cls, layouts: Sequence[SeqLayout]) -> Pieces:
        """Return the pieces of the shares of some layouts of one context."""
        return cls.of_runs([layout.runs for layout in layouts], layouts[0].document_starts)

    @classmethod
    def of_runs(cls, shares: Sequence[Sequence[tuple[int, int]]], document_starts: Sequence[int]) -> Pieces:
        """Return the pieces of shares, given as runs of positions in a context."""
        edges = chain.from_iterable(chain.from_iterable(shares))
        runs = np.fromiter(edges, np.int64).reshape(-1, 2)  # [runs, (start, stop)]
        owner = np.repeat(np.arange(len(shares)), [len(of_share) for of_share in shares])  # [runs]
        # Rows before each run: tokens of all runs before it, less those of other owners.
        before = np.cumsum(runs[:, 1] - runs[:, 0]) - (runs[:, 1] - runs[:, 0])
        row = before - before[np.searchsorted(owner, owner)]
        starts = np.array(document_starts)
        first_document = np.searchsorted(starts, runs[:, 0], side="right") - 1
        count = np.searchsorted(starts, runs[:, 1], side="left") - first_document  # documents that a run meets
        run, document = np.repeat(np.arange(len(runs)), count), count_up(first_document, count)  # [pieces], both
        first, last = starts[document], np.append(starts[1:], FAR - 1)[document]  # the last one has no end here
        start, stop = np.maximum(runs[run, 0], first), np.minimum(runs[run, 1], last)
        return cls(owner[run], start, stop, row[run] + start - runs[run, 0], document, first, last)

    def select(self, index: Any) -> Pieces:
        """Return the pieces at a numpy index."""
        return Pieces(*(getattr(self, field.name)[index] for field in fields(self)))

    def of_shared_documents(self) -> Pieces:
        """Return the pieces of the documents that several shares hold; all others see nothing outside their share."""
        least, most = np.full((2, int(self.document.max()) + 1), -1)  # owners by document
        least[self.document[::-1]] = self.owner[::-1]  # owners ascend: the first wins
        most[self.document] = self.owner
        return self.select(least[self.document] < most[self.document])

    def of_owners(self, owners: Ints) -> Pieces:
        """Return the pieces of `owners`, renumbered from 0 in this order."""
        first = np.searchsorted(self.owner, owners)
        count = np.searchsorted(self.owner, owners, side="right") - first
        return replace(self.select(count_up(first, count)), owner=np.repeat(np.arange(len(owners)), count))


class Tokens:
    """The tokens that several lines of shares hold, each line as if it were one share, to be searched."""

    def __init__(self, pieces: Pieces, line: Ints) -> None:
        """Take the tokens of `pieces`; those of owner n belong to line `line[n]`."""
        # A position of line n is the number n x FAR + position; runs ascend in it.
        start = line[pieces.owner] * FAR + pieces.start
        # The last run of both arrays lies beyond every line: a search that finds nothing ends there.
        order, far = start.argsort(kind="stable"), np.iinfo(np.int64).max
        self._start = np.append(start[order], far)
        self._stop = np.append((start + pieces.stop - pieces.start)[order], far)

    def first_from(self, line: Any, position: Ints) -> Ints:
        """Return the first position of a line from `position` on, or one beyond any context; arguments broadcast."""
        at = line * FAR + position
        # The first run that ends after the position: from its start on, if the position lies before it.
        return np.maximum(at, self._start[np.searchsorted(self._stop[:-1], at, side="right")]) - line * FAR

    def last_before(self, line: Any, position: Ints) -> Ints:
        """Return the last position of a line before `position`; there must be one. The arguments broadcast."""
        at = line * FAR + position
        # The last run that begins before the position: up to its stop, if the position lies beyond it.
        return np.minimum(at, self._stop[np.searchsorted(self._start[:-1], at) - 1]) - 1 - line * FAR


def rows_needed(pieces: Pieces, side: Side, others: Tokens, lines: Ints, visibility: Visibility) -> Ints:
    """Return the rows of each piece, of queries or of keys, that see or are seen by the other side's tokens in a line.

    `[lines, pieces, 2]`: the smallest range (start, stop), or `NONE`.
    """
    line = lines[:, None]  # [lines, 1], against pieces [pieces]
    a, b = pieces.start, pieces.stop
    if not visibility.causal:
        seen = others.first_from(line, pieces.first) < pieces.last
        start, stop = a[None], b[None]  # all rows of a piece, or none
    else:
        # Visibility is monotone in both positions, so the ends of the range follow from the nearest tokens.
        reach = (visibility.window or FAR) - 1  # distance from a query to the first key that it sees
        if side == "queries":  # a query sees the keys from `reach` before it, in its document, to itself
            low, high = np.maximum(pieces.first, a - reach), b
        else:  # a key is seen by the queries from itself to `reach` after it, in its document
            low, high = a, np.minimum(pieces.last, b + reach)
        nearest = others.first_from(line, low)
        seen = nearest < high
        farthest = others.last_before(line, high)
        if side == "queries":
            start, stop = np.maximum(a, nearest), np.minimum(b, farthest + reach + 1)
        else:
            start, stop = np.maximum(a, nearest - reach), np.minimum(b, farthest + 1)
    to_row = pieces.row - a  # position -> row of the share
    return np.stack([np.where(seen, x + to_row, none) for x, none in zip((start, stop), NONE, strict=True)], axis=-1)


def hull(ranges: Ints, owner: Ints, num_owners: int) -> Ints:
    """Return the smallest range that contains those of all pieces of an owner, or `NONE`.

    `[..., pieces, 2]` -> `[..., owners, 2]`; `owner` is `[pieces]`, ascending.
    """
    found = np.broadcast_to(NONE, (*ranges.shape[:-2], num_owners, 2)).copy()
    if owner.size:
        first = np.flatnonzero(np.diff(owner, prepend=-1))  # of the pieces of each owner that has some
        found[..., owner[first], 0] = np.minimum.reduceat(ranges[..., 0], first, axis=-1)
        found[..., owner[first], 1] = np.maximum.reduceat(ranges[..., 1], first, axis=-1)
    return found


class TravellingRows:
    """Rows of some owners' shares that travel on each leg, as runs; runs up to `GAP` rows apart are joined."""

    def __init__(self, ranges: Ints, owner: Ints, num_owners: int) -> None:
        """Take the rows needed of each piece, `[legs, pieces, 2]`, and the owners of the pieces, `[pieces]`."""
        start, stop = ranges[..., 0], ranges[..., 1]  # [legs, pieces]
        shift = owner * FAR  # rows of different owners never meet
        # Rows ascend with the pieces of an owner: the largest stop so far is that of the last run.
        before = np.maximum.accumulate(np.where(start < stop, stop + shift, -FAR), axis=-1)
        before = (
            np.concatenate([np.full((len(ranges), 1), -FAR), before[:, :-1]], axis=-1) - shift
        )  # end of the last run
        near = (start < stop) & (start - before <= GAP)
        self._ranges = np.stack([np.where(near, before, start), stop], axis=-1)  # a near run takes in the gap
        self._owner = owner
        # First piece of each owner, and the number of pieces at the end: [owners + 1].
        self._offsets = np.searchsorted(owner, np.arange(num_owners + 1)).tolist()

    def count(self, spans: Ints) -> Ints:
        """Return the number of rows within one span of each leg and owner: `[legs, owners, 2]` -> `[legs, owners]`."""
        of_piece = spans[:, self._owner]  # [legs, pieces, 2]
        start, stop = (
            np.maximum(self._ranges[..., 0], of_piece[..., 0]),
            np.minimum(self._ranges[..., 1], of_piece[..., 1]),
        )
        total = np.cumsum(np.maximum(stop - start, 0), axis=-1)
        # Rows before the first piece of each owner, and all rows: [legs, owners + 1].
        total = np.concatenate([np.zeros((len(total), 1), np.int64), total], axis=-1)[:, self._offsets]
        return np.diff(total, axis=-1)

    def runs(self, leg: int, owner: int, start: int, stop: int) -> Rows:
        """Return the rows in [start, stop) of an owner's share that travel on a leg."""
        found: list[tuple[int, int]] = []
        for a, b in self._ranges[leg, self._offsets[owner] : self._offsets[owner + 1]].tolist():
            a, b = max(a, start), min(b, stop)
            if a < b:
                found[-1:] = [(found[-1][0], b)] if found and found[-1][1] == a else [*found[-1:], (a, b)]
        return tuple(found)


class Meetings(NamedTuple):
    """Pairs of pieces of one document whose queries and keys meet, as indices `[n]` into `pieces`."""

    pieces: Pieces
    query: Ints
    key: Ints

    @classmethod
    def of(cls, pieces: Pieces, causal: bool = True, at_once: int = 2**62) -> Iterator[Meetings]:
        """Yield all pairs, about `at_once` at a time; with `causal`, only those whose keys are not the later piece."""
        of = pieces.select((pieces.document * FAR + pieces.start).argsort())  # by document, then position
        index = np.arange(len(of.start))
        first = np.searchsorted(of.document, of.document)  # a piece meets keys of pieces [first, stop)
        stop = index + 1 if causal else np.searchsorted(of.document, of.document, side="right")
        count = stop - first
        ends = np.cumsum(count)
        for at in range(0, int(ends[-1]), at_once):
            # Pieces of queries whose pairs begin in this part.
            q = index[(ends - count >= at) & (ends - count < at + at_once)]
            yield cls(of, np.repeat(q, count[q]), count_up(first[q], count[q]))

    def num_pairs(self, visibility: Visibility) -> Ints:
        """Return the number of visible (query, key) token pairs of each pair of pieces, `[n]`."""
        of, q, k = self
        i0, i1, j0, j1 = of.start[q], of.stop[q], of.start[k], of.stop[k]
        if not visibility.causal:
            return (i1 - i0) * (j1 - j0)
        found = _pairs_not_after(i0, i1, j0, j1)
        if visibility.window is not None:
            # A key `window` tokens or more before the query is not visible.
            found = found - _pairs_not_after(i0 - visibility.window, i1 - visibility.window, j0, j1)
        return found


def pairs_between(pieces: Pieces, num_owners: int, visibility: Visibility) -> Ints:
    """Return the number of visible (query, key) pairs between shares, `[owner of queries, owner of keys]`.

    The FLOPs of a tile are proportional to it. The shares have no token in common.
    """
    pairs = np.zeros(num_owners**2, np.int64)
    for met in Meetings.of(pieces, visibility.causal, PAIRS_AT_ONCE):
        owner = met.pieces.owner
        np.add.at(pairs, owner[met.query] * num_owners + owner[met.key], met.num_pairs(visibility))
    return pairs.reshape(num_owners, num_owners)


def count_up(first: Ints, count: Ints) -> Ints:
    """Return the ranges [first[i], first[i] + count[i]) of all i, end to end."""
    ends = np.cumsum(count)
    # ends - count: length of the result before each range.
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - (ends - count), count)


def _pairs_not_after(i0: Ints, i1: Ints, j0: Ints, j1: Ints) -> Ints:
    """Return the number of pairs (i, j) of [i0, i1) x [j0, j1) with j <= i."""

    def below(stop: Ints) -> Ints:
        """Return the number of pairs with i < stop and no lower limit: a triangle of rows, then full rows."""
        rows, width = np.maximum(stop - j0, 0), j1 - j0
        full = np.maximum(0, rows - width)  # queries after the last key see all keys
        rising = rows - full  # those among the keys see 1, 2, ... of them
        return rising * (rising + 1) // 2 + full * width

    return below(i1) - below(i0)
