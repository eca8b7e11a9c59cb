"""Which keys each query sees: one interval of key indices a query, whatever the mask.

Causal order, documents, a sliding window, a tile anywhere in the context and any mixture of these have one thing in
common: sorted by position, each query sees one run of keys, and both ends of it ascend from query to query. So the
kernels know one mask, two integers a row, and need neither positions nor kinds of mask. (FlashMask, arXiv
2410.01359, stores a mask by columns in a like way.)
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from .layout import SeqLayout


@dataclass(frozen=True, eq=False)
class Mask:
    """Visible (query, key) pairs of a tile, by index into its sequence dims, int32. Made by `make_mask`."""

    rows: Tensor
    """`[2, s_q]` on the device: query i sees the keys rows[0, i] <= j < rows[1, i]; both ends ascend with i."""
    columns: Tensor
    """`[2, s_k]` on the device: key j is seen by the queries columns[0, j] <= i < columns[1, j]."""
    host_rows: Tensor
    """`rows` on the CPU, for decisions that must not wait for the device."""

    @property
    def num_pairs(self) -> int:
        """Visible (query, key) pairs: what the work is proportional to."""
        start, stop = self.host_rows.long()
        return int((stop - start).sum())


@lru_cache(maxsize=256)
def make_mask(
    queries: SeqLayout,
    keys: SeqLayout,
    *,
    causal: bool = True,
    window: int | None = None,
    device: torch.device | str = "cpu",
) -> Mask:
    """The mask of a tile: same document, and with `causal` no key after its query.

    A `window` of w tokens lets a query see itself and the w - 1 positions before it. Raises ValueError for layouts
    with different documents, and for a window without causal order.
    """
    if queries.document_starts != keys.document_starts:
        raise ValueError(
            f"mask: queries lie in a context of {len(queries.document_starts)} documents and keys in one of "
            f"{len(keys.document_starts)}, or their boundaries differ: a tile belongs to one context"
        )
    if window is not None and not (causal and window >= 1):
        raise ValueError(f"mask: window = {window} with causal = {causal}; a window is causal and at least 1 token")
    q = queries.positions()
    starts = torch.tensor(queries.document_starts)
    document = torch.searchsorted(starts, q, right=True) - 1
    first = starts[document]
    if window is not None:
        first = torch.maximum(first, q - (window - 1))
    # Positions end at 2^62 for the last document: no context is that long.
    stop = q + 1 if causal else torch.cat([starts[1:], torch.tensor([2**62])])[document]
    rows = torch.stack([_num_before(keys, first), _num_before(keys, stop)])
    # Key j is seen from the first query whose keys end beyond it to the last one whose keys begin at or before it: from
    # as many as end at or before j, to as many as begin there.
    num_keys = keys.num_tokens
    columns = torch.stack([end.bincount(minlength=num_keys + 1).cumsum(0)[:num_keys] for end in (rows[1], rows[0])])
    host_rows = rows.int()
    return Mask(host_rows.to(device), columns.int().to(device), host_rows)


def _num_before(layout: SeqLayout, positions: Tensor) -> Tensor:
    """How many tokens of the layout lie before each position."""
    return sum(((positions - start).clamp(0, stop - start) for start, stop in layout.runs), torch.zeros_like(positions))


@dataclass(frozen=True)
class MaskRect:
    """A rectangle of a mask that an operator without intervals can do."""

    rows: slice
    keys: slice
    kind: Literal["full", "causal", "band"]
    """Every pair; the lower triangle of a square; or what `Mask.rows` says, in rows that all see some key."""


BAND_ROWS = 128
"""A band is done in blocks of so many rows, so that a window of w keys costs w + 128 a row, not the square."""


def mask_rects(host_rows: Tensor) -> list[MaskRect]:
    """Cut a mask into rectangles that cover its visible pairs exactly once (a band's outside is masked by hand).

    Between the rows where the pattern changes, both ends of the interval stand still (full), or the end advances by
    one a row (a triangle, beside what lies before it), or both move (a window: bands).
    """
    start, stop = host_rows
    start_moves, stop_moves = host_rows.diff().long()
    # 0: both stand still; 1: the end advances by one; 2: anything else. kinds[i] is the move from row i to row i + 1.
    kinds = torch.where(start_moves == 0, torch.where(stop_moves <= 1, stop_moves, 2), 2)
    changes = [*((kinds.diff() != 0).nonzero().flatten() + 1).tolist(), len(start) - 1]
    found: list[MaskRect] = []
    row = 0
    while row < len(start):
        kind = int(kinds[row]) if row < len(kinds) else 0  # the last row, left alone, is a rectangle
        last = max(row, changes[bisect.bisect_right(changes, row, hi=len(changes) - 1)])
        if kind == 2:
            # The last row of a band begins the next pattern, unless it is the mask's; a band of one row is a rectangle.
            last = min(last if last == len(start) - 1 else last - 1, row + BAND_ROWS - 1)
            kind = 2 if last > row else 0
        rows = slice(row, last + 1)
        row = last + 1
        first_start, first_stop, last_stop = int(start[rows.start]), int(stop[rows.start]), int(stop[last])
        if kind == 1:
            # The first row sees key first_stop - 1 as the triangle's corner, if it sees any.
            corner = max(first_stop - 1, first_start)
            if corner == first_stop:  # it sees none: the triangle starts one row later
                rows = slice(rows.start + 1, rows.stop)
            found.append(MaskRect(rows, slice(corner, last_stop), "causal"))
            if corner > first_start:
                found.append(MaskRect(rows, slice(first_start, corner), "full"))
        elif kind == 0 and first_stop > first_start:
            found.append(MaskRect(rows, slice(first_start, first_stop), "full"))
        elif kind == 2:
            found.extend(_bands(start, stop, rows))
    return found


def _bands(start: Tensor, stop: Tensor, rows: slice) -> Iterator[MaskRect]:
    """The runs of rows that see some key; rows that see none may stand anywhere among them."""
    see_some = (stop[rows] > start[rows]).tolist()
    for sees, run in groupby(range(rows.start, rows.stop), key=lambda row: see_some[row - rows.start]):
        if sees:
            seeing = list(run)
            first, last = seeing[0], seeing[-1]
            yield MaskRect(slice(first, last + 1), slice(int(start[first]), int(stop[last])), "band")
