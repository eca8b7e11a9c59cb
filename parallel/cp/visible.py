"""Who sees whom between two ranks' shares, in closed form: which rows take part, and how many pairs are visible.

The rules are those of `kernels.mask`: same document, no key after its query under causal order, fewer than `window`
tokens before it. Here they are asked of whole runs, on the host, so that a plan for 1,024 ranks and a million tokens
costs no more than one for a thousand tokens; and of many pairs of shares at once, so that 1,024 ranks cost little too.
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
"""Half-open range of indices into the sequence dim of one rank's share."""
Ints = NDArray[np.int64]

_FAR = 2**62  # a position that no context reaches
NONE = np.array([_FAR, 0, _FAR, 0])
"""Of `visible_rows`, where there are none: neutral to the hull, which is the least start and the greatest stop."""


@dataclass(frozen=True)
class Sight:
    """What a query may see: causal order, and with `window` no more than itself and the window - 1 tokens before."""

    causal: bool = True
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and not (self.causal and self.window >= 1):
            raise ValueError(f"window = {self.window} with causal = {self.causal}: a window is causal and >= 1 token")


@dataclass(frozen=True, eq=False)
class Shares:
    """What ranks hold of one context, as arrays `[..., runs]`; shares of fewer runs than others have empty ones."""

    start: Ints
    stop: Ints
    row: Ints
    """At which each run begins."""
    document_starts: Ints

    @classmethod
    def of(cls, layouts: Sequence[SeqLayout]) -> Shares:
        """Those of some ranks."""
        runs = np.zeros((3, len(layouts), max(len(layout.runs) for layout in layouts)), np.int64)
        for rank, layout in enumerate(layouts):
            rows = accumulate((stop - start for start, stop in layout.runs), initial=0)
            for number, ((start, stop), row) in enumerate(zip(layout.runs, rows, strict=False)):
                runs[:, rank, number] = start, stop, row
        return cls(runs[0], runs[1], runs[2], np.array(layouts[0].document_starts))

    def __getitem__(self, ranks: Any) -> Shares:
        return Shares(self.start[ranks], self.stop[ranks], self.row[ranks], self.document_starts)


def visible_rows(queries: Shares, keys: Shares, sight: Sight) -> Ints:
    """The smallest range of query rows that see any key, and of key rows that any query sees: `[..., 4]`, or `NONE`.

    Shares are compared one with one, as arrays are broadcast. Ranges are hulls: where both runs of a share take part,
    what lies between is inside.
    """
    starts = queries.document_starts
    a, b, row = (x[..., :, None] for x in (queries.start, queries.stop, queries.row))
    c, d, column = (x[..., None, :] for x in (keys.start, keys.stop, keys.row))
    if sight.causal:
        # Key j < a is seen if a itself sees it; query i >= d sees something if it sees d - 1.
        first_key, stop_key = np.maximum(c, _first_seen(a, starts, sight)), np.minimum(d, b)
        first_query, stop_query = np.maximum(a, c), np.minimum(b, _stop_seeing(d - 1, starts, sight))
    else:
        first_key = np.maximum(c, _document(a, starts)[0])
        stop_key = np.minimum(d, _document(b - 1, starts)[1])
        first_query = np.maximum(a, _document(c, starts)[0])
        stop_query = np.minimum(b, _document(d - 1, starts)[1])
    seen = (first_key < stop_key) & (first_query < stop_query)
    to_row, to_column = row - a, column - c
    ranges = (first_query + to_row, stop_query + to_row, first_key + to_column, stop_key + to_column)
    return hull(np.stack([np.where(seen, x, none) for x, none in zip(ranges, NONE, strict=True)], axis=-1), (-3, -2))


def hull(ranges: Ints, axis: int | tuple[int, ...]) -> Ints:
    """The smallest ranges that hold all along an axis; of the last dim even numbers are starts, odd ones stops."""
    starts, stops = ranges[..., 0::2].min(axis), ranges[..., 1::2].max(axis)
    return np.stack([starts, stops], axis=-1).reshape(*starts.shape[:-1], -1)


def num_pairs(queries: Shares, keys: Shares, sight: Sight) -> Ints:
    """Visible (query, key) pairs between shares, one with one: what computing their tiles costs."""
    a, b = (x[..., :, None] for x in (queries.start, queries.stop))
    c, d = (x[..., None, :] for x in (keys.start, keys.stop))
    pairs = np.zeros(np.broadcast_shapes(a.shape, c.shape), np.int64)
    for start, stop in pairwise([*queries.document_starts.tolist(), _FAR]):
        i0, i1, j0, j1 = np.maximum(a, start), np.minimum(b, stop), np.maximum(c, start), np.minimum(d, stop)
        i1, j1 = np.maximum(i0, i1), np.maximum(j0, j1)
        if not sight.causal:
            pairs += (i1 - i0) * (j1 - j0)
            continue
        pairs += _pairs_not_after(i0, i1, j0, j1)
        if sight.window is not None:
            pairs -= _pairs_not_after(i0 - sight.window, i1 - sight.window, j0, j1)
    return pairs.sum((-2, -1))


def _document(positions: Ints, starts: Ints) -> tuple[Ints, Ints]:
    index = np.searchsorted(starts, positions, side="right")
    return starts[index - 1], np.append(starts, _FAR)[index]


def _first_seen(queries: Ints, starts: Ints, sight: Sight) -> Ints:
    """First position that a query at this position sees; it ascends with the query."""
    first = _document(queries, starts)[0]
    return first if sight.window is None else np.maximum(first, queries - sight.window + 1)


def _stop_seeing(keys: Ints, starts: Ints, sight: Sight) -> Ints:
    """The first position after each key whose query does not see it any more."""
    stop = _document(keys, starts)[1]
    return stop if sight.window is None else np.minimum(stop, keys + sight.window)


def _pairs_not_after(i0: Ints, i1: Ints, j0: Ints, j1: Ints) -> Ints:
    """Pairs (i, j) of [i0, i1) x [j0, j1) with j <= i."""

    def below(stop: Ints) -> Ints:
        rows, width = np.maximum(stop - j0, 0), j1 - j0
        full = np.maximum(0, rows - width)
        rising = rows - full
        return rising * (rising + 1) // 2 + full * width

    return below(i1) - below(i0)
