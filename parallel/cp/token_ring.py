"""TokenRing (arXiv 2412.20501), forward and backward, causal and zigzag.

Q walks round the ring while K and V stay; each partial result goes straight home to the rank that owns the queries,
against the walk, so both directions of every link are at work. The backward walks (Q, dout, lse, delta) the same way:
dK and dV add up where K and V are, in fp32, and only dQ goes home. (The paper's code has no backward; a ring of K and
V would move K, V and fp32 dK, dV.)

Ranks hold zigzag chunks r and 2n-1-r, front and back. At step s rank r computes for the queries of rank j = r + s:

    step 0        own queries    own keys        causal
    j > r         all queries    front keys      every pair visible
    j < r         back queries   all keys        every pair visible

Each is half of all pairs, so no rank waits for another; and a rank about to need only the back queries is sent
no more than those. Every message of a step is posted before the step's computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.attention import attention_backward, attention_forward, row_delta, zeros_fp32
from ...kernels.layout import SeqLayout
from ...kernels.mask import Mask, make_mask
from ...kernels.merge import merge_
from .layout import zigzag

Part = Literal["all", "front", "back"]


@dataclass(frozen=True)
class Ring:
    """This rank's place in a context-parallel group of `size` neighbours; `rank` counts within the group.

    The walk of queries and the way home have a process group each: of their own NCCL communicator and stream, or of
    their own gloo connection, where traffic both ways over one would take twice the time. A ring of one needs none.
    """

    rank: int
    size: int
    query_group: dist.ProcessGroup | None = None
    home_group: dist.ProcessGroup | None = None

    def layout(self, num_tokens: int) -> SeqLayout:
        """What this rank holds of a sequence of `num_tokens`."""
        return zigzag(num_tokens, self.rank, self.size)


@dataclass(frozen=True)
class Step:
    """One tile of the schedule: the queries of rank `owner`, of which `queries`, against `keys` of this rank."""

    owner: int
    queries: Part
    keys: Part


def token_ring_step(rank: int, size: int, step: int) -> Step:
    """What `rank` computes at `step` of `size`; the schedule is this function and nothing else."""
    owner = (rank + step) % size
    if owner == rank:
        return Step(owner, "all", "all")
    return Step(owner, "all", "front") if owner > rank else Step(owner, "back", "all")


def token_ring_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: SeqLayout, *, ring: Ring, backend: str = "auto"
) -> Tensor:
    """Causal self-attention over the sequence that the ring's ranks hold together.

    q `[b, s, h_q, d]`, k, v `[b, s, h_kv, d]` and the result are this rank's share, `layout` its positions, those of
    `ring.layout(s * ring.size)`, and the documents of the whole sequence. Collective: every rank of the ring calls it,
    with shapes alike.
    """
    expected = ring.layout(layout.num_tokens * ring.size)
    if layout.runs != expected.runs:
        raise ValueError(f"token ring: rank {ring.rank} of {ring.size} holds {layout.runs}, zigzag is {expected.runs}")
    # Its messages are no graph: torch.compile breaks here and goes on after.
    return torch.compiler.disable(_TokenRing.apply)(q, k, v, layout.document_starts, ring, backend)  # type: ignore[return-value]


class _TokenRing(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, document_starts: tuple[int, ...], ring: Ring, backend: str
    ) -> Tensor:  # type: ignore[override]
        tiles = _Tiles(ring, q.shape[1], document_starts)

        def compute(step: Step, held: list[Tensor]) -> list[Tensor]:
            part_out, part_lse = attention_forward(
                held[0], cut(k, step.keys), cut(v, step.keys), tiles.mask(step, q.device), backend=backend
            )
            # Everything that travels has its sequence on dim 1.
            return [part_out, part_lse.transpose(1, 2)]

        out = lse = None
        for step, (part_out, part_lse) in _walk(ring, [q], compute):
            part_lse = part_lse.transpose(1, 2)
            if out is None or lse is None:
                out, lse = part_out.to(part_lse.dtype), part_lse.clone()
            else:
                rows = tiles.rows(step.queries)
                merge_(out[:, rows], lse[:, :, rows], part_out.unsqueeze(0), part_lse.unsqueeze(0))
        assert out is not None, "a ring has at least one step"
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tiles, ctx.backend = tiles, backend
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        tiles = ctx.tiles
        dq, dk, dv = zeros_fp32(q), zeros_fp32(k), zeros_fp32(v)
        delta = row_delta(dout, out)

        def compute(step: Step, held: list[Tensor]) -> list[Tensor]:
            part_q, part_dout, part_lse, part_delta = held
            part_dq = zeros_fp32(part_q)
            attention_backward(
                part_dout,
                part_q,
                cut(k, step.keys),
                cut(v, step.keys),
                part_lse.transpose(1, 2),
                part_delta.transpose(1, 2),
                tiles.mask(step, q.device),
                into=(part_dq, cut(dk, step.keys), cut(dv, step.keys)),
                backend=ctx.backend,
            )
            return [part_dq.to(q.dtype)]

        held = [q, dout, lse.transpose(1, 2), delta.transpose(1, 2)]
        for step, (part_dq,) in _walk(tiles.ring, held, compute):
            dq[:, tiles.rows(step.queries)].add_(part_dq)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def cut(x: Tensor, part: Part) -> Tensor:
    """The front or back half of dim 1, or all of it, as a view."""
    half = x.shape[1] // 2
    return x if part == "all" else x[:, :half] if part == "front" else x[:, half:]


class _Tiles:
    """Masks of the tiles of one call: `num_tokens` on each rank of the ring."""

    def __init__(self, ring: Ring, num_tokens: int, document_starts: tuple[int, ...]) -> None:
        self.ring = ring
        self.num_tokens = num_tokens
        self.document_starts = document_starts

    def mask(self, step: Step, device: torch.device) -> Mask:
        queries, keys = self._part(step.owner, step.queries), self._part(self.ring.rank, step.keys)
        return make_mask(queries, keys, device=device)

    def rows(self, part: Part) -> slice:
        return slice(self.num_tokens // 2, None) if part == "back" else slice(None)

    def _part(self, rank: int, part: Part) -> SeqLayout:
        runs = zigzag(self.num_tokens * self.ring.size, rank, self.ring.size).runs
        return SeqLayout(runs if part == "all" else runs[:1] if part == "front" else runs[1:], self.document_starts)


def _walk(
    ring: Ring, held: list[Tensor], compute: Callable[[Step, list[Tensor]], list[Tensor]]
) -> Iterator[tuple[Step, list[Tensor]]]:
    """Walk `held` round the ring, computing at every stop; yield the results for this rank's own queries.

    Each comes with the step at which it was computed, in the order of steps on every rank: results merge in a fixed
    order and two runs agree bit for bit. A result leaves during the step after its own, except the last, which
    nothing is left to hide. All tensors have the sequence on dim 1.
    """
    rank, size = ring.rank, ring.size
    before, after = (rank - 1) % size, (rank + 1) % size
    own = held
    results: list[Tensor] = []
    own_results: list[Tensor] = []
    for s in range(size):
        step = token_ring_step(rank, size, s)
        sends: list[Tensor] = []
        incoming: list[Tensor] = []
        if s + 1 < size:
            narrows = step.queries != token_ring_step(before, size, s + 1).queries
            sends = [cut(x, "back") if narrows else x for x in held]
            incoming = _buffers(own, token_ring_step(rank, size, s + 1).queries)
        walking = _post(ring.query_group, sends, before, incoming, after)
        coming_home = _send_home(ring, s - 1, results, own_results) if s >= 2 else None
        results = compute(step, held)
        if s == 0:
            own_results = results
            yield step, results
        if coming_home is not None:
            yield coming_home()
        _wait(walking)
        held = incoming
    if size > 1:
        yield _send_home(ring, size - 1, results, own_results)()


def _send_home(
    ring: Ring, s: int, results: list[Tensor], own_results: list[Tensor]
) -> Callable[[], tuple[Step, list[Tensor]]]:
    """Post the results of step `s` to the queries' owner, and what another rank computed then for this one's.

    Returns the wait, which gives that rank's step and its results; `own_results` (of step 0) give their shapes.
    """
    source = (ring.rank - s) % ring.size
    step = token_ring_step(source, ring.size, s)
    incoming = _buffers(own_results, step.queries)
    works = _post(ring.home_group, results, token_ring_step(ring.rank, ring.size, s).owner, incoming, source)

    def wait() -> tuple[Step, list[Tensor]]:
        _wait(works)
        return step, incoming

    return wait


def _buffers(like: list[Tensor], part: Part) -> list[Tensor]:
    return [torch.empty_like(cut(x, part), memory_format=torch.contiguous_format) for x in like]


def _post(
    group: dist.ProcessGroup | None, sends: list[Tensor], to: int, incoming: list[Tensor], source: int
) -> list[dist.Work]:
    """Start sending to and receiving from ranks of the group, as one batch."""
    if not sends:
        return []
    return dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, x.contiguous(), group=group, group_peer=to) for x in sends]
        + [dist.P2POp(dist.irecv, x, group=group, group_peer=source) for x in incoming]
    )


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()
