"""Tiles by the kernels of FlashAttention and its like: a mask as calls of diagonal bands, packed end to end.

Such a kernel computes a band: of n queries and m keys, query i sees the keys j with
i + m - n - left <= j <= i + m - n + right, where each bound may be missing. "Variable length" means that it computes
several of them at once, queries and keys end to end, with the same bounds. The rows of an interval mask are cut into
such bands exactly: no pair is computed twice, and each row is in one band, so that bands of one tile need no merge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .case import Kind, addressable
from .mask import Mask
from .merge import merge_


class Call(NamedTuple):
    """One call of a kernel: one band, or several packed ones."""

    rows: slice
    """The queries."""
    keys: slice
    left: int | None
    """Bounds of each band, see the top of this file; None: no bound."""
    right: int | None
    query_starts: Tensor | None = None
    """The first query of each packed band and the number of queries, int32 `[bands + 1]` on the device; None: one band,
    which is not packed."""
    key_starts: Tensor | None = None
    """The first key of each packed band and the number of keys, as `query_starts`."""
    most_queries: int = 0
    """Queries of the longest packed band."""
    most_keys: int = 0

    @property
    def is_causal(self) -> bool:
        """Whether the band is the lower triangle, from its last query and last key on."""
        return self.left is None and self.right == 0

    @property
    def windows(self) -> tuple[int, int]:
        """The bounds as FlashAttention takes them: -1 for none."""
        return (-1 if self.left is None else self.left, -1 if self.right is None else self.right)


class Kernel(NamedTuple):
    """One package's kernel. Tensors are `[b, s, h, d]` with lse, delta `[b, h, s]`; packed `[s, h, d]`, `[h, s]`."""

    forward: Callable[[Tensor, Tensor, Tensor, Call, float, float], tuple[Tensor, Tensor]]
    """(q, k, v, call, scale, softcap) -> out, lse."""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """(dout, q, k, v, out, lse, delta, call, scale, softcap) -> dq, dk, dv. Either out or delta may be None."""


class _Band(NamedTuple):
    """Rows that see a band of keys, with the smallest and largest value of each bound of it; None: no largest."""

    rows: slice
    keys: slice
    left: tuple[int, int | None]
    right: tuple[int, int | None]


def forward(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float,
    softcap: float,
    running: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Return out `[b, s_q, h_q, d]` and lse `[b, h_q, s_q]` as `attention.attention_forward` does.

    q is `[b, s_q, h_q, d]`, k and v are `[b, s_k, h_kv, d]`.
    """
    calls = calls_of(mask)
    if running is None and len(calls) == 1 and calls[0].rows == slice(0, q.shape[1]):
        return _forward(kernel, q, k, v, calls[0], scale, softcap)
    if running is None:
        # Rows in no call see no key and keep out 0, lse -inf.
        b, s, h, _ = q.shape
        out, lse = torch.zeros_like(q), torch.full((b, h, s), -torch.inf, dtype=torch.float32, device=q.device)
    else:
        out, lse = running
    for call in calls:
        part_out, part_lse = _forward(kernel, q, k, v, call, scale, softcap)
        of_rows = out[:, call.rows], lse[:, :, call.rows]  # views
        if running is None:
            of_rows[0].copy_(part_out)
            of_rows[1].copy_(part_lse)
        else:
            merge_(*of_rows, part_out.unsqueeze(0), part_lse.unsqueeze(0))
    return out, lse


def backward(
    kernel: Kernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    delta: Tensor | None,
    mask: Mask,
    scale: float,
    softcap: float,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Add dq, dk, dv to the buffers `into`, shaped like q, k, v, as `attention.attention_backward` does.

    Buffers in 16 bit are written if `is_one_call`. dout, q, out are `[b, s_q, h_q, d]`, k, v `[b, s_k, h_kv, d]`, lse,
    delta `[b, h_q, s_q]`.
    """
    dq, dk, dv = into
    assert dq.itemsize > 2 or is_one_call(mask), "the front door sums the calls of other masks in fp32"
    for call in calls_of(mask):
        rows, keys = call.rows, call.keys
        queries = (dout[:, rows], q[:, rows], None if out is None else out[:, rows])
        stats = (lse[:, :, rows], None if delta is None else delta[:, :, rows])
        totals = (dq[:, rows], dk[:, keys], dv[:, keys])
        for at in _sequences(call, len(q)):
            dout_, q_, out_ = (None if x is None else addressable(x[at]) for x in queries)
            lse_, delta_ = (None if x is None else x[at].contiguous() for x in stats)
            k_, v_ = addressable(k[:, keys][at]), addressable(v[:, keys][at])
            grads = kernel.backward(dout_, q_, k_, v_, out_, lse_, delta_, call, scale, softcap)
            for total, grad in zip(totals, grads, strict=True):
                total[at].add_(grad) if total.itemsize > 2 else total[at].copy_(grad)


def is_one_call(mask: Mask) -> bool:
    """Return whether one call has all queries and all keys of a mask."""
    groups = _groups_of(mask)
    whole = slice(0, mask.rows.shape[1]), slice(0, mask.columns.shape[1])
    return len(groups) == 1 and _sides(groups[0]) == whole


def kind_of(mask: Mask) -> Kind:
    """Return the kind of a tile's mask. Nothing is copied to its device."""
    match _groups_of(mask):
        case [[band]] if band.rows == slice(0, mask.rows.shape[1]):
            if band.left[1] is not None:
                return "window"
            return "whole" if band.right[1] is None else "causal"
    return "documents"


def some_see_nothing(mask: Mask) -> bool:
    """Return whether a query of the tile sees no key: it is in no band."""
    rows = (_sides(group)[0] for group in _groups_of(mask))
    return sum(of_group.stop - of_group.start for of_group in rows) < mask.rows.shape[1]


_GROUPS, _CALLS = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
"""Groups of bands, and calls, by `Mask.host_rows`: layers share a mask, and so do passes."""


def calls_of(mask: Mask) -> list[Call]:
    """Return the calls whose bands cover each visible pair of a mask exactly once; made once for each mask."""
    if mask.host_rows not in _CALLS:
        _CALLS[mask.host_rows] = [_packed(group, mask.rows.device) for group in _groups_of(mask)]
    return _CALLS[mask.host_rows]


def _groups_of(mask: Mask) -> list[list[_Band]]:
    """Return the bands of a mask by the calls that compute them."""
    if mask.host_rows not in _GROUPS:
        _GROUPS[mask.host_rows] = list(_groups(mask.host_rows))
    return _GROUPS[mask.host_rows]


def _groups(host_rows: Tensor) -> Iterator[list[_Band]]:
    """Return the bands of a mask in groups of adjacent ones with common bounds."""
    group: list[_Band] = []
    for band in _bands(host_rows):
        if group:
            last = group[-1]
            left, right = (_common(a, b) for a, b in ((last.left, band.left), (last.right, band.right)))
            adjacent = last.rows.stop == band.rows.start and last.keys.stop == band.keys.start
            if adjacent and left is not None and right is not None:
                group.append(band._replace(left=left, right=right))
                continue
            yield group
        group = [band]
    if group:
        yield group


def _bands(host_rows: Tensor) -> Iterator[_Band]:
    """Cut the rows `[2, s_q]` of a mask into bands; rows that see no key are in none.

    In a band the first visible key stands still for some rows and then moves by one a row; the last visible key moves
    by one a row and then stands still.
    """
    start, stop = host_rows
    sees = stop > start
    starts_by, stops_by = start.diff(), stop.diff()  # [s_q - 1]: how each end moves from row i to row i + 1
    ends = (starts_by > 1) | (stops_by > 1) | (sees[1:] != sees[:-1])  # a band ends with row i
    # A first key that moves from row i to row i + 1 and then stands still is that of a document that begins there.
    ends[:-1] |= (starts_by[:-1] == 1) & (starts_by[1:] == 0)
    # A last key that stands still up to row i and then moves has come to another run of keys, which row i + 1 begins.
    ends[1:] |= (stops_by[:-1] == 0) & (stops_by[1:] == 1)
    last = torch.cat([ends.nonzero().flatten(), torch.tensor([len(start) - 1])])
    first = torch.cat([torch.zeros(1, dtype=last.dtype), last[:-1] + 1])
    columns = [first, last, start[first], stop[first], start[last], stop[last]]
    # Plain integers of all bands at once: [bands, 6]. A band's first row sees the keys [a, b), its last [c, d).
    for row, end, a, b, c, d in torch.stack(columns, 1).tolist():
        if a == b:
            continue
        band = _band(row, end, a, b, c, d)
        if band.right[1] is None or band.right[1] < d - a:
            yield band
        else:
            # With many more queries than keys the bound is so large that FlashAttention-2 would take it for no bound.
            grown = row + d - b  # the first row that sees the last key
            yield _band(row, grown, a, b, int(start[grown]), d)
            yield _band(grown + 1, end, int(start[grown + 1]), d, c, d)


def _band(row: int, last: int, start: int, stop: int, last_start: int, last_stop: int) -> _Band:
    """Return the rows from `row` to `last`, which see the keys [start, stop) and [last_start, last_stop), as a band."""
    num_rows, num_keys = last + 1 - row, last_stop - start
    start_moves, stop_moves = last_start - start, last_stop - stop
    # An end that never moves is described by every bound from the smallest on that no row of the band reaches.
    left, right = num_keys - 1 - start_moves, num_rows - 1 - stop_moves
    bounds = (left, left if start_moves else None), (right, right if stop_moves else None)
    return _Band(slice(row, last + 1), slice(start, last_stop), *bounds)


def _common(a: tuple[int, int | None], b: tuple[int, int | None]) -> tuple[int, int | None] | None:
    """Return the values (smallest, largest) of a bound that fit two bands, or None if none does."""
    least, most = max(a[0], b[0]), min((x[1] for x in (a, b) if x[1] is not None), default=None)
    return None if most is not None and least > most else (least, most)


def _packed(group: list[_Band], device: torch.device) -> Call:
    """Return the call of a group of bands."""
    last = group[-1]  # its bounds are those of the group
    # A bound with a largest value has exactly this value; a bound without one is reached by no row of the bands.
    left, right = last.left[1], last.right[1]
    rows, keys = _sides(group)
    if len(group) == 1:
        return Call(rows, keys, left, right)
    queries = [band.rows.stop - band.rows.start for band in group]
    num_keys = [band.keys.stop - band.keys.start for band in group]
    starts = torch.tensor([queries, num_keys], dtype=torch.int32).cumsum(1, dtype=torch.int32)  # [2, bands]
    starts = torch.cat([torch.zeros(2, 1, dtype=torch.int32), starts], 1)
    # From page-locked memory, so that the host does not wait for the copy to a GPU.
    starts = (starts.pin_memory() if device.type == "cuda" else starts).to(device, non_blocking=True)
    return Call(rows, keys, left, right, starts[0], starts[1], max(queries), max(num_keys))


def _sides(group: list[_Band]) -> tuple[slice, slice]:
    """Return the queries and the keys of adjacent bands."""
    first, last = group[0], group[-1]
    return slice(first.rows.start, last.rows.stop), slice(first.keys.start, last.keys.stop)


def _sequences(call: Call, batch: int) -> list[Any]:
    """Return the indices of a batch that one call takes: all at once, or packed bands of one sequence after another."""
    return [slice(None)] if call.query_starts is None else list(range(batch))


def _forward(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Return out `[b, rows, h_q, d]` and lse `[b, h_q, rows]` of the rows of one call."""
    q, k, v = q[:, call.rows], k[:, call.keys], v[:, call.keys]
    found = [
        kernel.forward(addressable(q[at]), addressable(k[at]), addressable(v[at]), call, scale, softcap)
        for at in _sequences(call, len(q))
    ]
    if call.query_starts is None:
        return found[0]
    outs, lses = zip(*found, strict=True)
    return (outs[0][None], lses[0][None]) if len(found) == 1 else (torch.stack(outs), torch.stack(lses))
