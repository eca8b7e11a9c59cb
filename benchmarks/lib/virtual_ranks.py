"""The ranks of one attention inside one process and on one device, for `cp_virtual` and `cp_precision`.

`forward_in_process` and `backward_in_process` run a member of the family with all its messages, each a copy; `Tiles`
makes only its kernel calls; `Whole` is one kernel over the whole sequence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from longring.kernels import attention as front_door
from longring.kernels import layout
from longring.kernels import mask as masks
from longring.parallel.cp import execute, transports, visible
from longring.parallel.cp import grid as grids
from longring.parallel.cp import layout as cp_layout
from longring.parallel.cp.plan import Pass
from torch import Tensor

from .cases import Case, layout_of

RESULTS = ("out", "lse", "dq", "dk", "dv")


class Trial(NamedTuple):
    """One attention, and the members that divide it among `size` ranks."""

    case: Case
    size: int
    members: tuple[str, ...]

    @property
    def visibility(self) -> visible.Visibility:
        """Return the visibility of keys to queries."""
        return visible.Visibility(window=self.case.tokens // 32 - 3 if self.case.mask == "window" else None)

    def spec(self, member: str, backend: str, **options: Any) -> execute.AttentionSpec:
        """Return the member's division of the attention, in zigzag layout."""
        whole = layout_of(self.case)
        shares = [cp_layout.zigzag(self.case.tokens, rank, self.size).runs for rank in range(self.size)]
        layouts = tuple(layout.SeqLayout(runs, whole.document_starts) for runs in shares)
        return execute.AttentionSpec(grid_of(member, self.size), layouts, self.visibility, backend, **options)

    def unfit(self, member: str) -> str | None:
        """Return why a member cannot divide the heads, or None."""
        return grid_of(member, self.size).unfit(self.case.heads, self.case.kv_heads)


def grid_of(member: str, size: int) -> grids.CpGrid:
    """Return the grid of a named member; `hybrid` takes two nodes."""
    return grids.CpGrid.hybrid(2, size // 2) if member == "hybrid" else grids.NAMED[member](size)


def share_of(x: Tensor, of: layout.SeqLayout) -> Tensor:
    """Return the tokens of layout `of` from x [b, all tokens, ...]."""
    return torch.cat([x[:, start:stop] for start, stop in of.runs], dim=1)


def put_share(whole: Tensor, part: Tensor, of: layout.SeqLayout) -> None:
    """Write the tokens of layout `of` into `whole`: the inverse of `share_of`."""
    at = 0
    for start, stop in of.runs:
        whole[:, start:stop] = part[:, at : at + stop - start]
        at += stop - start


def heads_of(num_heads: int, rank: int, heads: int) -> slice:
    """Return the range of `num_heads` heads that `rank` computes, where `heads` ranks hold each grid position."""
    index = rank % heads
    first = index * num_heads // heads
    return slice(first, max(first + 1, (index + 1) * num_heads // heads))  # at least one: kv heads may be fewer


def forward_in_process(spec: execute.AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Any]]:
    """Return out of every rank, and the tensors that every rank saves for its backward."""
    transport = transports.InProcess()
    walks = [
        execute.forward(spec, rank, share_of(q, of), share_of(k, of), share_of(v, of), transport)
        for rank, of in enumerate(spec.layouts)
    ]
    found = transport.drive(walks)
    return [out for out, _ in found], [saved for _, saved in found]


def backward_in_process(
    spec: execute.AttentionSpec, dout: Tensor, saved: list[Any], kv_heads: int
) -> list[tuple[Tensor, ...]]:
    """Return dq, dk and dv of every rank."""
    transport = transports.InProcess()
    shares = [share_of(dout, of) for of in spec.layouts]
    return transport.drive(
        [execute.backward(spec, rank, x, saved[rank], kv_heads, transport) for rank, x in enumerate(shares)]
    )


def joined(
    spec: execute.AttentionSpec, tensors: tuple[Tensor, ...], outs: list[Tensor], saved: list[Any], grads: list[Any]
) -> dict[str, Tensor]:
    """Return the ranks' results in the order of the sequence."""
    q, k, v = tensors
    found = {name: torch.empty_like(x) for name, x in (("out", q), ("dq", q), ("dk", k), ("dv", v))}
    for of, out, parts in zip(spec.layouts, outs, grads, strict=True):
        for name, part in zip(("out", "dq", "dk", "dv"), (out, *parts), strict=True):
            put_share(found[name], part, of)
    lses = [x[4].transpose(1, 2) for x in saved]
    lse, heads = lses[0].new_empty((1, q.shape[1], q.shape[2])), spec.grid.heads
    of_positions = cp_layout.position_layouts(spec.layouts, heads)
    for rank, part in enumerate(lses):
        put_share(lse[:, :, heads_of(q.shape[2], rank, heads)], part, of_positions[rank // heads])
    return found | {"lse": lse.transpose(1, 2)}


class Whole:
    """One kernel over the whole sequence."""

    def __init__(self, trial: Trial, device: str, backend: str, tensors: tuple[Tensor, ...]) -> None:
        whole = layout_of(trial.case)
        self.mask = masks.make_mask(whole, whole, window=trial.visibility.window, device=device)
        self.backend, self.tensors = backend, tensors

    def forward(self, _: Any, running: Any = None) -> tuple[Tensor, Tensor]:
        """Return out and lse."""
        q, k, v, _ = self.tensors
        return front_door.attention_forward(q, k, v, self.mask, running=running, backend=self.backend)

    def backward(self, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk and dv in fp32."""
        q, k, v, dout = self.tensors
        out, lse = found
        into = (front_door.zeros_fp32(q), front_door.zeros_fp32(k), front_door.zeros_fp32(v))
        delta = front_door.row_delta(dout, out.to(q.dtype))
        front_door.attention_backward(dout, q, k, v, lse, delta, self.mask, into=into, backend=self.backend)
        return into

    def results(self) -> dict[str, Tensor]:
        """Return out, lse, dq, dk and dv, in fp32 where inputs are in 16 bit."""
        out, lse = self.forward(None, front_door.no_result(self.tensors[0]))
        return dict(zip(RESULTS, (out, lse, *self.backward((out, lse))), strict=True))


class Call(NamedTuple):
    """One kernel call: rows of the queries of one rank, rows of the keys of one rank, and their mask."""

    queries: int
    query_rows: slice
    keys: int
    key_rows: slice
    mask: Any


class Tiles:
    """The kernel calls of all ranks of a spec, on slices of whole shares, without messages.

    `shares` are the tensors of each rank: the tokens of its grid position, its heads. The results of all ranks for one
    share are added to one running result: no rank waits, and the sum is the attention of the whole sequence.
    """

    def __init__(self, spec: execute.AttentionSpec, device: str, tensors: tuple[Tensor, ...]) -> None:
        self.backend, heads = spec.backend, spec.grid.heads
        self.calls: dict[Pass, list[Call]] = {"forward": [], "backward": []}
        self.shares: list[list[Tensor]] = []
        of_positions = cp_layout.position_layouts(spec.layouts, heads)
        for rank in range(spec.grid.size):
            position, head_shard = divmod(rank, heads)  # ranks of one position follow one another
            for direction, calls in self.calls.items():
                for tile in spec.compiled(direction, rank).tiles:
                    queries, keys = (slice(rows[0][0], rows[-1][1]) for rows in (tile.query_rows, tile.key_rows))
                    sides = (
                        of_positions[tile.query_owner].part([(queries.start, queries.stop)]),
                        of_positions[tile.key_owner].part([(keys.start, keys.stop)]),
                    )
                    mask = masks.make_mask(*sides, window=spec.visibility.window, device=device)
                    of_query, of_key = (owner * heads + head_shard for owner in (tile.query_owner, tile.key_owner))
                    calls.append(Call(of_query, queries, of_key, keys, mask))
            mine = [x[:, :, heads_of(x.shape[2], rank, heads)] for x in tensors]  # [1, all tokens, heads, d]
            self.shares.append([share_of(x, of_positions[position]).contiguous() for x in mine])

    def num_pairs(self, direction: Pass) -> int:
        """Return the number of visible pairs, times the heads of a rank."""
        return sum(call.mask.num_pairs * self.shares[0][0].shape[2] for call in self.calls[direction])

    def forward(self, _: Any) -> list[tuple[Tensor, Tensor]]:
        """Return out and lse of every rank."""
        results = [front_door.no_result(q) for q, *_ in self.shares]
        for at, rows, keys_at, keys, mask in self.calls["forward"]:
            (q, *_), (_, k, v, _), (out, lse) = self.shares[at], self.shares[keys_at], results[at]
            front_door.attention_forward(
                q[:, rows], k[:, keys], v[:, keys], mask, running=(out[:, rows], lse[:, :, rows]), backend=self.backend
            )
        return [(out.to(q.dtype), lse) for (out, lse), (q, *_) in zip(results, self.shares, strict=True)]

    def backward(self, found: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return dq, dk and dv of every rank in fp32."""
        deltas = [front_door.row_delta(dout, out) for (*_, dout), (out, _) in zip(self.shares, found, strict=True)]
        zeros = front_door.zeros_fp32
        grads = [(zeros(q), zeros(k), zeros(v)) for q, k, v, _ in self.shares]
        for at, rows, keys_at, keys, mask in self.calls["backward"]:
            (q, _, _, dout), (_, k, v, _) = self.shares[at], self.shares[keys_at]
            (dq, _, _), (_, dk, dv) = grads[at], grads[keys_at]
            front_door.attention_backward(
                dout[:, rows], q[:, rows], k[:, keys], v[:, keys], found[at][1][:, :, rows], deltas[at][:, :, rows],
                mask, into=(dq[:, rows], dk[:, keys], dv[:, keys]), backend=self.backend,
            )  # fmt: skip
        return grads
