"""The mask of a tile: one interval of key indices for every query.

Causal order, documents, an attention window, a tile anywhere in the context and any combination of these share one
property: sorted by position, each query sees one run of keys, and both ends of the run ascend from query to query. So
two integers per row describe every mask, and the kernels need neither positions nor kinds of mask. (FlashMask, arXiv
2410.01359, stores masks by columns in a similar way.)
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Literal

import torch
from torch import Tensor

from .layout import SeqLayout


@dataclass(frozen=True, eq=False)
class Mask:
    """The visible (query, key) pairs of a tile, as int32 indices into its sequence dims. `make_mask` makes it."""

    rows: Tensor
    """`[2, s_q]` on the device: query i sees key j if rows[0, i] <= j < rows[1, i]; both ends ascend with i."""
    columns: Tensor
    """`[2, s_k]` on the device: query i sees key j if columns[0, j] <= i < columns[1, j]; both ends ascend with j."""
    host_rows: Tensor
    """`rows` `[2, s_q]` on the CPU, for decisions that must not wait for the device."""

    @property
    def num_pairs(self) -> int:
        """The number of visible (query, key) pairs; FLOPs are proportional to it."""
        start, stop = self.host_rows.long()
        return int((stop - start).sum())


@dataclass(frozen=True, eq=False)
class HostMasks:
    """Masks of several tiles in one tensor on the host, from which one copy brings all of them to a device."""

    flat: Tensor
    """`Mask.rows` and then `Mask.columns` of each tile, int32, end to end: `[sum of 2 s_q + 2 s_k]`."""
    shapes: tuple[tuple[int, int], ...]
    """Number of queries and of keys of each tile."""

    def on(self, device: torch.device) -> list[Mask]:
        """Return the masks on a device. If they lie in page-locked memory, the host does not wait for the copy."""
        flat, ends = self.flat.to(device, non_blocking=True), accumulate((2 * sum(x) for x in self.shapes), initial=0)
        masks = []
        for start, (s_q, s_k) in zip(ends, self.shapes, strict=False):
            middle, stop = start + 2 * s_q, start + 2 * (s_q + s_k)
            rows = slice(start, middle)
            masks.append(Mask(flat[rows].view(2, s_q), flat[middle:stop].view(2, s_k), self.flat[rows].view(2, s_q)))
        return masks


def host_masks(
    tiles: Sequence[tuple[SeqLayout, SeqLayout]],
    *,
    causal: bool = True,
    window: int | None = None,
    pin_memory: bool = False,
) -> HostMasks:
    """Return the masks of tiles, each given by the layouts of its queries and keys; see `make_mask`.

    With `pin_memory` they lie in page-locked memory. Raises ValueError as `make_mask` does.
    """
    parts = [part.flatten() for queries, keys in tiles for part in _intervals(queries, keys, causal, window)]
    flat = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)
    return HostMasks(flat.pin_memory() if pin_memory else flat, tuple((q.num_tokens, k.num_tokens) for q, k in tiles))


@lru_cache(maxsize=256)
def make_mask(
    queries: SeqLayout,
    keys: SeqLayout,
    *,
    causal: bool = True,
    window: int | None = None,
    device: torch.device | str = "cpu",
) -> Mask:
    """Return the mask of a tile: a query sees the keys of its document and, if `causal`, none after itself.

    With an attention `window` of w tokens a query sees itself and the w - 1 positions before it. The layouts of the
    s_q queries and s_k keys give `Mask.rows` `[2, s_q]` and `Mask.columns` `[2, s_k]`. Raises ValueError if the
    layouts' documents differ, if window is below 1, or if a window is given without causal order.
    """
    rows, columns = _intervals(queries, keys, causal, window)
    return Mask(rows.to(device), columns.to(device), rows)


def _intervals(queries: SeqLayout, keys: SeqLayout, causal: bool, window: int | None) -> tuple[Tensor, Tensor]:
    """Return `Mask.rows` and `Mask.columns` on the host."""
    if queries.document_starts != keys.document_starts:
        raise ValueError(
            f"mask: queries in a context of {len(queries.document_starts)} documents, keys in one of "
            f"{len(keys.document_starts)}: document_starts must be equal; take both layouts from one context"
        )
    if window is not None and window < 1:
        raise ValueError(f"mask: window = {window}: must be at least 1; give None for no window")
    if window is not None and not causal:
        raise ValueError(f"mask: window = {window} with causal = False: a window needs causal order; set causal = True")
    # Per query, [s_q]: the first visible position `first` and the one after the last, `stop`.
    q = queries.positions()
    starts = torch.tensor(queries.document_starts)
    document = torch.searchsorted(starts, q, right=True) - 1
    first = starts[document]
    if window is not None:
        first = torch.maximum(first, q - (window - 1))
    # The last document has no next start: 2^62 stands for it, beyond any context.
    stop = q + 1 if causal else torch.cat([starts[1:], torch.tensor([2**62])])[document]
    rows = torch.stack([_num_before(keys, first), _num_before(keys, stop)])  # [2, s_q], key positions -> key indices
    # Both ends ascend, so queries [a, b) see key j: a = number of intervals that end at or before j, b = number that
    # begin at or before j. Each is a cumulative histogram of one end, [s_k].
    num_keys = keys.num_tokens
    columns = torch.stack([end.bincount(minlength=num_keys + 1).cumsum(0)[:num_keys] for end in (rows[1], rows[0])])
    return rows.int(), columns.int()


def _num_before(layout: SeqLayout, positions: Tensor) -> Tensor:
    """Return the number of the layout's tokens before each of `positions` `[n]`, int64 `[n]`."""
    start, stop = torch.tensor(layout.runs).T.contiguous()
    ends = (stop - start).cumsum(0)
    run = torch.searchsorted(start, positions).sub_(1).clamp_(min=0)  # the last run that begins before the position
    return ends[run] - (stop[run] - positions).clamp_(min=0).minimum((stop - start)[run])


@dataclass(frozen=True)
class MaskRect:
    """A rectangle of a mask that an attention operator without interval masks can compute."""

    rows: slice
    """The queries."""
    keys: slice
    """The keys."""
    kind: Literal["full", "causal", "band"]
    """The visible pairs: all of them, the lower triangle of a square, or in a "band" those that `Mask.rows` gives."""


BAND_ROWS = 128
"""The largest number of rows of a band, so that an attention window of w keys costs w + 128 per row, not s_k."""

_STILL, _GROWING, _MOVING = 0, 1, 2
"""The patterns by which the interval changes from row to row: not at all; the end advances by one; any other way."""


def mask_rects(host_rows: Tensor) -> list[MaskRect]:
    """Cut the mask `host_rows` `[2, s_q]` into rectangles that cover each visible pair exactly once.

    Rows whose interval stands still form one "full" rectangle. Rows whose interval grows by one key each form a
    "causal" triangle beside a "full" rectangle of the keys before it. All other rows, such as those of an attention
    window, form "band" rectangles, which also contain pairs that are not visible.
    """
    start, stop = host_rows
    rects: list[MaskRect] = []
    for pattern, rows in _patterns(start, stop):
        first, end = int(start[rows.start]), int(stop[rows.start])  # the first row sees the keys [first, end)
        if pattern == _GROWING:
            rects.extend(_triangle(rows, first, end))
        elif pattern == _MOVING:
            rects.extend(_bands(start, stop, rows))
        elif end > first:
            rects.append(MaskRect(rows, slice(first, end), "full"))
    return rects


def _patterns(start: Tensor, stop: Tensor) -> Iterator[tuple[int, slice]]:
    """Divide the rows into adjacent slices of one pattern each, in order; start and stop are `[s_q]`."""
    num_rows = len(start)
    start_moves, stop_moves = start.diff(), stop.diff()
    # moves[i] is the pattern from row i to row i + 1; a slice of n rows has n - 1 moves.
    moves = torch.where((start_moves == 0) & (stop_moves <= 1), stop_moves, _MOVING)
    # The rows at which a pattern may end: those before and after which the moves differ, and the last row.
    ends = [*((moves.diff() != 0).nonzero().flatten() + 1).tolist(), num_rows - 1]
    row = 0
    while row < num_rows:
        # Invariant: the rows before `row` are done, and none of them shares a slice with it.
        pattern = int(moves[row]) if row < num_rows - 1 else _STILL
        last = ends[bisect.bisect_right(ends, row, hi=len(ends) - 1)]
        if pattern == _MOVING:
            # A band leaves its last row to the next pattern, which may be a triangle that begins there.
            last = min(last if last == num_rows - 1 else last - 1, row + BAND_ROWS - 1)
            pattern = _MOVING if last > row else _STILL
        yield pattern, slice(row, last + 1)
        row = last + 1


def _triangle(rows: slice, first: int, end: int) -> Iterator[MaskRect]:
    """Cut rows that see the keys [first, end), [first, end + 1), ... into a triangle and the rectangle before it."""
    last_end = end + rows.stop - rows.start - 1
    if end == first:  # the first row sees no key: the triangle begins with the second
        yield MaskRect(slice(rows.start + 1, rows.stop), slice(first, last_end), "causal")
        return
    # The last key of the first row is the corner of the triangle.
    yield MaskRect(rows, slice(end - 1, last_end), "causal")
    if end - 1 > first:
        yield MaskRect(rows, slice(first, end - 1), "full")


def _bands(start: Tensor, stop: Tensor, rows: slice) -> Iterator[MaskRect]:
    """Cut `rows` into bands: runs of rows that see some key. Rows that see none may stand anywhere among them."""
    sees = (stop[rows] > start[rows]).tolist()
    for seeing, run in groupby(range(rows.start, rows.stop), key=lambda row: sees[row - rows.start]):
        if seeing:
            band = list(run)
            first, last = band[0], band[-1]
            yield MaskRect(slice(first, last + 1), slice(int(start[first]), int(stop[last])), "band")
