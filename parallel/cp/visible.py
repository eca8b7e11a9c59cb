"""Who sees whom between two ranks' shares, in closed form: which rows take part, and how many pairs are visible.

The rules are those of `kernels.mask`: same document, no key after its query under causal order, fewer than `window`
tokens before it. Here they are asked of whole runs, on the host, so that a plan for 1,024 ranks and a million tokens
costs no more than one for a thousand tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

from ...kernels.layout import SeqLayout

Rows = tuple[int, int]
"""Half-open range of indices into the sequence dim of one rank's share."""

_FAR = 2**62  # a position that no context reaches


@dataclass(frozen=True)
class Sight:
    """What a query may see: causal order, and with `window` no more than itself and the window - 1 tokens before."""

    causal: bool = True
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and not (self.causal and self.window >= 1):
            raise ValueError(f"window = {self.window} with causal = {self.causal}: a window is causal and >= 1 token")


def visible_rows(queries: SeqLayout, keys: SeqLayout, sight: Sight) -> tuple[Rows, Rows] | None:
    """The smallest range of query rows that see any key here, and of key rows that any query sees; None if none does.

    Ranges are hulls: where both runs of a share take part, what lies between is inside.
    """
    starts = queries.document_starts
    query_rows: list[Rows] = []
    key_rows: list[Rows] = []
    for a, b, row in _runs(queries):
        for c, d, column in _runs(keys):
            if sight.causal:
                # Key j < a is seen if a itself sees it; query i >= d sees something if it sees d - 1.
                first_key, stop_key = max(c, _first_seen(a, starts, sight)), min(d, b)
                first_query, stop_query = max(a, c), min(b, _stop_seeing(d - 1, starts, sight))
            else:
                first_key, stop_key = max(c, _document(a, starts)[0]), min(d, _document(b - 1, starts)[1])
                first_query, stop_query = max(a, _document(c, starts)[0]), min(b, _document(d - 1, starts)[1])
            if first_key < stop_key and first_query < stop_query:
                query_rows.append((row + first_query - a, row + stop_query - a))
                key_rows.append((column + first_key - c, column + stop_key - c))
    if not query_rows:
        return None
    return hull(query_rows), hull(key_rows)


def num_pairs(queries: SeqLayout, keys: SeqLayout, sight: Sight) -> int:
    """Visible (query, key) pairs between two shares: what computing their tile costs."""
    starts = queries.document_starts
    pairs = 0
    for a, b, _ in _runs(queries):
        for c, d, _ in _runs(keys):
            # Documents from the first that may reach both runs to the last that begins within both.
            for index in range(bisect_right(starts, max(a, c)) - 1, len(starts)):
                start, stop = starts[index], starts[index + 1] if index + 1 < len(starts) else _FAR
                if start >= min(b, d):
                    break
                i0, i1, j0, j1 = max(a, start), min(b, stop), max(c, start), min(d, stop)
                if i0 >= i1 or j0 >= j1:
                    continue
                if not sight.causal:
                    pairs += (i1 - i0) * (j1 - j0)
                    continue
                pairs += _pairs_not_after(i0, i1, j0, j1)
                if sight.window is not None:
                    pairs -= _pairs_not_after(i0 - sight.window, i1 - sight.window, j0, j1)
    return pairs


def hull(ranges: list[Rows]) -> Rows:
    """The smallest range that holds all of these."""
    return min(start for start, _ in ranges), max(stop for _, stop in ranges)


def _runs(layout: SeqLayout) -> list[tuple[int, int, int]]:
    """Each run's start and stop, and the row at which it begins."""
    rows = accumulate((stop - start for start, stop in layout.runs), initial=0)
    return [(start, stop, row) for (start, stop), row in zip(layout.runs, rows, strict=False)]


def _document(position: int, starts: tuple[int, ...]) -> tuple[int, int]:
    index = bisect_right(starts, position)
    return starts[index - 1], starts[index] if index < len(starts) else _FAR


def _first_seen(query: int, starts: tuple[int, ...], sight: Sight) -> int:
    """First position that a query at this position sees; it ascends with the query."""
    start = _document(query, starts)[0]
    return start if sight.window is None else max(start, query - sight.window + 1)


def _stop_seeing(key: int, starts: tuple[int, ...], sight: Sight) -> int:
    """The first position after `key` whose query does not see it any more."""
    stop = _document(key, starts)[1]
    return stop if sight.window is None else min(stop, key + sight.window)


def _pairs_not_after(i0: int, i1: int, j0: int, j1: int) -> int:
    """Pairs (i, j) of [i0, i1) x [j0, j1) with j <= i."""

    def below(stop: int) -> int:
        rows, width = stop - j0, j1 - j0
        if rows <= 0:
            return 0
        full = max(0, rows - width)
        rising = rows - full
        return rising * (rising + 1) // 2 + full * width

    return below(i1) - below(i0)
