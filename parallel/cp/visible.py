"""Visibility between shares in closed form: rows of two shares that see each other, and the number of visible pairs.

The rules are those of `kernels.mask`: same document, no key after its query if causal, fewer than `window` tokens
before it. They are applied to whole runs of positions on the host, so the cost does not grow with the number of tokens,
and to many pairs of shares at once, so that 1,024 ranks are planned in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...kernels.layout import SeqLayout

Rows = tuple[int, int]
"""Half-open range of rows: indices into the sequence dim of one share."""
Ints = NDArray[np.int64]

_FAR = 2**62  # a position that no context reaches
NONE = np.array([_FAR, 0, _FAR, 0])
"""Value of `visible_rows` for shares that do not see each other: the neutral element of `hull`."""


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
class Shares:
    """Runs of positions that shares of one context hold, as arrays `[..., runs]`, padded with empty runs."""

    start: Ints
    """First position of each run."""
    stop: Ints
    """Position after the last of each run."""
    row: Ints
    """Row of the share at which each run begins."""
    document_starts: Ints
    """Positions at which documents begin, ascending from 0, `[documents]`."""

    @classmethod
    def of(cls, layouts: Sequence[SeqLayout]) -> Shares:
        """Return the shares of some layouts of one context: arrays `[layouts, runs]`."""
        # [start | stop | row, layout, run]
        runs = np.zeros((3, len(layouts), max(len(layout.runs) for layout in layouts)), np.int64)
        for rank, layout in enumerate(layouts):
            rows = accumulate((stop - start for start, stop in layout.runs), initial=0)
            for number, ((start, stop), row) in enumerate(zip(layout.runs, rows, strict=False)):
                runs[:, rank, number] = start, stop, row
        return cls(runs[0], runs[1], runs[2], np.array(layouts[0].document_starts))

    def __getitem__(self, ranks: Any) -> Shares:
        return Shares(self.start[ranks], self.stop[ranks], self.row[ranks], self.document_starts)


def visible_rows(queries: Shares, keys: Shares, visibility: Visibility) -> Ints:
    """Return the smallest range of query rows that see a key, and of key rows that a query sees.

    The shares broadcast; the result is `[..., 4]` (query start, query stop, key start, key stop), or `NONE`. A range is
    a hull: if two runs of a share take part, the rows between them are inside.
    """
    starts = queries.document_starts
    # Query runs [..., q, 1] against key runs [..., 1, k].
    a, b, row = (x[..., :, None] for x in (queries.start, queries.stop, queries.row))
    c, d, column = (x[..., None, :] for x in (keys.start, keys.stop, keys.row))
    if visibility.causal:
        # Visibility is monotone in both positions: a key before query a is seen by the run if a sees it, and a query
        # after key d - 1 sees a key of the run if it sees d - 1.
        first_key, stop_key = np.maximum(c, _first_seen(a, starts, visibility)), np.minimum(d, b)
        first_query, stop_query = np.maximum(a, c), np.minimum(b, _stop_seeing(d - 1, starts, visibility))
    else:
        first_key = np.maximum(c, _document(a, starts)[0])
        stop_key = np.minimum(d, _document(b - 1, starts)[1])
        first_query = np.maximum(a, _document(c, starts)[0])
        stop_query = np.minimum(b, _document(d - 1, starts)[1])
    seen = (first_key < stop_key) & (first_query < stop_query)
    to_row, to_column = row - a, column - c  # from positions to rows
    ranges = (first_query + to_row, stop_query + to_row, first_key + to_column, stop_key + to_column)
    # [..., q, k, 4] -> [..., 4]
    return hull(np.stack([np.where(seen, x, none) for x, none in zip(ranges, NONE, strict=True)], axis=-1), (-3, -2))


def hull(ranges: Ints, axis: int | tuple[int, ...]) -> Ints:
    """Return the smallest ranges that contain all ranges along `axis`: `[..., axis, ..., 2 n]` -> `[..., 2 n]`.

    Even indices of the last dim are starts, odd ones stops.
    """
    starts, stops = ranges[..., 0::2].min(axis), ranges[..., 1::2].max(axis)
    return np.stack([starts, stops], axis=-1).reshape(*starts.shape[:-1], -1)


def num_pairs(queries: Shares, keys: Shares, visibility: Visibility) -> Ints:
    """Return the number of visible (query, key) pairs, `[...]`, to which the FLOPs of a tile are proportional.

    The shares broadcast.
    """
    a, b = (x[..., :, None] for x in (queries.start, queries.stop))
    c, d = (x[..., None, :] for x in (keys.start, keys.stop))
    pairs = np.zeros(np.broadcast_shapes(a.shape, c.shape), np.int64)  # [..., q, k]
    # Documents are independent: clip both runs to each, and count causal pairs less those beyond the attention window.
    for start, stop in pairwise([*queries.document_starts.tolist(), _FAR]):
        i0, i1, j0, j1 = np.maximum(a, start), np.minimum(b, stop), np.maximum(c, start), np.minimum(d, stop)
        i1, j1 = np.maximum(i0, i1), np.maximum(j0, j1)
        if not visibility.causal:
            pairs += (i1 - i0) * (j1 - j0)
            continue
        pairs += _pairs_not_after(i0, i1, j0, j1)
        if visibility.window is not None:
            pairs -= _pairs_not_after(i0 - visibility.window, i1 - visibility.window, j0, j1)
    return pairs.sum((-2, -1))


def _document(positions: Ints, starts: Ints) -> tuple[Ints, Ints]:
    """Return first position and stop of the document of each position."""
    index = np.searchsorted(starts, positions, side="right")
    return starts[index - 1], np.append(starts, _FAR)[index]


def _first_seen(queries: Ints, starts: Ints, visibility: Visibility) -> Ints:
    """Return the first position that each query sees; it ascends with the query."""
    first = _document(queries, starts)[0]
    return first if visibility.window is None else np.maximum(first, queries - visibility.window + 1)


def _stop_seeing(keys: Ints, starts: Ints, visibility: Visibility) -> Ints:
    """Return the first position after each key whose query does not see the key; it ascends with the key."""
    stop = _document(keys, starts)[1]
    return stop if visibility.window is None else np.minimum(stop, keys + visibility.window)


def _pairs_not_after(i0: Ints, i1: Ints, j0: Ints, j1: Ints) -> Ints:
    """Return the number of pairs (i, j) of [i0, i1) x [j0, j1) with j <= i."""

    def below(stop: Ints) -> Ints:
        """Return the number of pairs with i < stop and no lower limit: a triangle of rows, then full rows."""
        rows, width = np.maximum(stop - j0, 0), j1 - j0
        full = np.maximum(0, rows - width)
        rising = rows - full
        return rising * (rising + 1) // 2 + full * width

    return below(i1) - below(i0)
