"""The ranks of one attention inside one process and on one device: what `cp_virtual` and `cp_precision` compare.

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
from longring.parallel.cp import heads as cp_heads
from longring.parallel.cp import layout as cp_layout
from torch import Tensor

from .cases import Case, layout_of

RESULTS = ("out", "lse", "dq", "dk", "dv")


class Question(NamedTuple):
    """One attention, and the members that divide it among `size` ranks."""

    case: Case
    size: int
    members: tuple[str, ...]

    @property
    def visibility(self) -> Any:
        """Who sees whom."""
        return visible.Visibility(window=self.case.tokens // 32 - 3 if self.case.mask == "window" else None)

    def spec(self, member: str, backend: str, **options: Any) -> Any:
        """A member's division of it, zigzag."""
        whole = layout_of(self.case)
        shares = [cp_layout.zigzag(self.case.tokens, rank, self.size).runs for rank in range(self.size)]
        layouts = tuple(layout.SeqLayout(runs, whole.document_starts) for runs in shares)
        return execute.AttentionSpec(grid_of(member, self.size), layouts, self.visibility, backend, **options)

    def unfit(self, member: str) -> str | None:
        """Why a member cannot divide its heads."""
        return grid_of(member, self.size).unfit(self.case.heads, self.case.kv_heads)


def grid_of(member: str, size: int) -> Any:
    """A named member; `hybrid` takes two nodes."""
    return grids.CpGrid.hybrid(2, size // 2) if member == "hybrid" else grids.NAMED[member](size)


def share_of(x: Tensor, of: Any) -> Tensor:
    """The tokens of a layout, of all the tokens."""
    return torch.cat([x[:, start:stop] for start, stop in of.runs], dim=1)


def put_share(whole: Tensor, part: Tensor, of: Any) -> None:
    """The way back."""
    at = 0
    for start, stop in of.runs:
        whole[:, start:stop] = part[:, at : at + stop - start]
        at += stop - start


def forward_in_process(spec: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Any]]:
    """out of every rank, and what it saves."""
    transport = transports.InProcess()
    shares = [[share_of(x, of) for x in (q, k, v)] for of in spec.layouts]
    found = transport.drive([execute.forward(spec, rank, *x, transport) for rank, x in enumerate(shares)])
    return [out for out, _ in found], [saved for _, saved in found]


def backward_in_process(spec: Any, dout: Tensor, saved: list[Any], kv_heads: int) -> list[tuple[Tensor, ...]]:
    """dq, dk, dv of every rank."""
    transport = transports.InProcess()
    shares = [share_of(dout, of) for of in spec.layouts]
    return transport.drive(
        [execute.backward(spec, rank, x, saved[rank], kv_heads, transport) for rank, x in enumerate(shares)]
    )


def joined(
    spec: Any, tensors: tuple[Tensor, ...], outs: list[Tensor], saved: list[Any], grads: list[Any]
) -> dict[str, Tensor]:
    """What the ranks found, in the order of the sequence."""
    q, k, v = tensors
    found = {name: torch.empty_like(x) for name, x in (("out", q), ("dq", q), ("dk", k), ("dv", v))}
    for of, out, parts in zip(spec.layouts, outs, grads, strict=True):
        for name, part in zip(("out", "dq", "dk", "dv"), (out, *parts), strict=True):
            put_share(found[name], part, of)
    lses = [x[4].transpose(1, 2) for x in saved]
    lse = lses[0].new_empty((1, q.shape[1], q.shape[2]))
    for rank, part in enumerate(lses):
        schedule, plan = spec.plan("forward", rank)
        mine = cp_heads.heads_of(q.shape[2], rank, spec.grid.heads)
        put_share(lse[:, :, mine], part, schedule.layouts[plan.position])
    return found | {"lse": lse.transpose(1, 2)}


class Whole:
    """One kernel over the whole sequence."""

    def __init__(self, question: Question, device: str, backend: str, tensors: tuple[Tensor, ...]) -> None:
        whole = layout_of(question.case)
        self.mask = masks.make_mask(whole, whole, window=question.visibility.window, device=device)
        self.backend, self.tensors = backend, tensors

    def forward(self, _: Any, running: Any = None) -> tuple[Tensor, Tensor]:
        """out, lse."""
        q, k, v, _ = self.tensors
        return front_door.attention_forward(q, k, v, self.mask, running=running, backend=self.backend)

    def backward(self, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv in fp32."""
        q, k, v, dout = self.tensors
        out, lse = found
        into = tuple(front_door.zeros_fp32(x) for x in (q, k, v))
        delta = front_door.row_delta(dout, out.to(q.dtype))
        front_door.attention_backward(dout, q, k, v, lse, delta, self.mask, into=into, backend=self.backend)
        return into

    def results(self) -> dict[str, Tensor]:
        """In fp32 at least, not rounded to the dtype of inputs in 16 bit."""
        out, lse = self.forward(None, front_door.no_result(self.tensors[0]))
        return dict(zip(RESULTS, (out, lse, *self.backward((out, lse))), strict=True))


class Call(NamedTuple):
    """One kernel call: which rows of which of the blocks."""

    queries: int
    query_rows: slice
    keys: int
    key_rows: slice
    mask: Any


class Tiles:
    """The kernel calls of all ranks of a spec, on the slices that the executor makes, and no messages.

    Blocks are those of each rank: its place's tokens, its heads. What ranks add to the results for one block is added
    to one running result, so that no rank waits and the sum is the attention of the whole.
    """

    def __init__(self, spec: Any, device: str, tensors: tuple[Tensor, ...]) -> None:
        self.backend, heads = spec.backend, spec.grid.heads
        self.calls: dict[str, list[Call]] = {"forward": [], "backward": []}
        self.blocks: list[list[Tensor]] = []
        for rank in range(spec.grid.size):
            for direction, calls in self.calls.items():
                schedule, plan = spec.plan(direction, rank)
                shard = rank - plan.position * heads
                for tile in filter(None, (step.tile for step in plan.steps)):
                    mask = execute.mask_of(tile, schedule.layouts, spec.visibility, device)
                    queries, keys = (owner * heads + shard for owner in (tile.query_owner, tile.key_owner))
                    calls.append(Call(queries, slice(*tile.query_rows), keys, slice(*tile.key_rows), mask))
            mine = [x[:, :, cp_heads.heads_of(x.shape[2], rank, heads)] for x in tensors]
            self.blocks.append([share_of(x, schedule.layouts[plan.position]).contiguous() for x in mine])

    def num_pairs(self, direction: str) -> int:
        """Visible pairs, times the heads of a block."""
        return sum(call.mask.num_pairs * self.blocks[0][0].shape[2] for call in self.calls[direction])

    def forward(self, _: Any) -> list[tuple[Tensor, Tensor]]:
        """out, lse of every block."""
        results = [front_door.no_result(q) for q, *_ in self.blocks]
        for at, rows, keys_at, keys, mask in self.calls["forward"]:
            (q, *_), (_, k, v, _), (out, lse) = self.blocks[at], self.blocks[keys_at], results[at]
            front_door.attention_forward(
                q[:, rows], k[:, keys], v[:, keys], mask, running=(out[:, rows], lse[:, :, rows]), backend=self.backend
            )
        return [(out.to(q.dtype), lse) for (out, lse), (q, *_) in zip(results, self.blocks, strict=True)]

    def backward(self, found: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """dq, dk, dv of every block in fp32."""
        deltas = [front_door.row_delta(dout, out) for (*_, dout), (out, _) in zip(self.blocks, found, strict=True)]
        grads = [tuple(front_door.zeros_fp32(x) for x in (q, k, v)) for q, k, v, _ in self.blocks]
        for at, rows, keys_at, keys, mask in self.calls["backward"]:
            (q, _, _, dout), (_, k, v, _) = self.blocks[at], self.blocks[keys_at]
            (dq, _, _), (_, dk, dv) = grads[at], grads[keys_at]
            front_door.attention_backward(
                dout[:, rows], q[:, rows], k[:, keys], v[:, keys], found[at][1][:, :, rows], deltas[at][:, :, rows],
                mask, into=(dq[:, rows], dk[:, keys], dv[:, keys]), backend=self.backend,
            )  # fmt: skip
        return grads
