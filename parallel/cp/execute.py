"""Executor: runs a rank's plan, forward and backward, over any transport.

A pass is a generator that yields each message when it must wait for it; the transport that drives the generator does
the waiting. So one process can run all ranks of a plan in turn, with the code that runs on a cluster.

Tensors that travel, and tensors that sum up results, have the sequence on dim 1: `[b, s, h, d]`, and `[b, s, h]` for
lse and delta, which are transposed views of the kernels' `[b, h, s]`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...kernels.attention import attention_backward, attention_forward, row_delta, zeros_fp32
from ...kernels.layout import SeqLayout
from ...kernels.mask import Mask, make_mask
from ...kernels.merge import merge_
from .grid import CpGrid
from .heads import heads_for_tokens, tokens_for_heads
from .plan import Flow, Message, Pass, RankPlan, Share, Side, Tile
from .schedules import Schedule
from .transports import Transport
from .visible import Rows, Visibility


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """Attention over a sequence that several ranks hold: the values that all of these ranks have in common.

    Plans and masks are made once and kept here, for all layers and passes: keep the object as long as the documents of
    the sequence stay the same.
    """

    grid: CpGrid
    layouts: tuple[SeqLayout, ...]
    """Layout of each rank."""
    visibility: Visibility
    backend: str = "auto"
    """Attention kernels, as in `kernels.attention`."""
    narrow_results: bool = True
    """Send partial results in the dtype of the inputs; False: in fp32. Sums are fp32 in either case."""
    masks: dict[Tile, Mask] = field(default_factory=dict, repr=False)
    """Masks of the tiles computed so far, on the device of the first inputs."""
    _made: dict[tuple[Pass, int], tuple[Schedule, RankPlan]] = field(default_factory=dict, repr=False)

    def plan(self, direction: Pass, rank: int) -> tuple[Schedule, RankPlan]:
        """Return the schedule of a pass and the plan of one rank; made once, then kept.

        Raises ValueError if there is not one layout for each rank.
        """
        if (direction, rank) not in self._made:
            schedule = Schedule(self.grid, self.layouts, self.visibility, direction)
            self._made[direction, rank] = (schedule, schedule.plan(rank))
        return self._made[direction, rank]


def mask_of(tile: Tile, layouts: Sequence[SeqLayout], visibility: Visibility, device: torch.device | str) -> Mask:
    """Return the mask of a tile; `layouts` has one layout for each grid position."""
    queries = layouts[tile.query_owner].part(*tile.query_rows)
    keys = layouts[tile.key_owner].part(*tile.key_rows)
    return make_mask(queries, keys, causal=visibility.causal, window=visibility.window, device=device)


Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Tensors that the backward needs: q, k, v, out `[b, s, h, d]` and lse `[b, h, s]`, with all tokens of the rank's grid
position and the heads of the rank."""


def forward(
    spec: AttentionSpec, rank: int, q: Tensor, k: Tensor, v: Tensor, transport: Transport
) -> Generator[Message, None, tuple[Tensor, Saved]]:
    """Run the forward of one rank: q `[b, s, h_q, d]`, k, v `[b, s, h_kv, d]` -> out like q, and the tensors to save.

    Collective: every rank of the grid runs its own generator. Yields each message that must be waited for.
    """
    schedule, plan = spec.plan("forward", rank)
    if spec.grid.heads > 1:
        q, k, v = yield from tokens_for_heads([q, k, v], plan, schedule, transport)
    run = _Forward(spec, plan, schedule, transport, q, k, v)
    yield from run.steps()
    out, lse = run.out.to(q.dtype), run.lse
    # Saved before heads are traded back: the backward needs the position's tokens with the rank's heads.
    saved = (q, k, v, out, lse)
    if spec.grid.heads > 1:
        (out,) = yield from heads_for_tokens([out], [q.shape[2] * spec.grid.heads], plan, schedule, transport)
    return out, saved


def backward(
    spec: AttentionSpec, rank: int, dout: Tensor, saved: Saved, num_kv_heads: int, transport: Transport
) -> Generator[Message, None, tuple[Tensor, Tensor, Tensor]]:
    """Run the backward of one rank: dout `[b, s, h_q, d]` -> dq like dout, dk and dv `[b, s, h_kv, d]`, with all heads.

    Collective: every rank of the grid runs its own generator. Yields each message that must be waited for.
    """
    schedule, plan = spec.plan("backward", rank)
    q, k, v, out, lse = saved
    if spec.grid.heads > 1:
        (dout,) = yield from tokens_for_heads([dout], plan, schedule, transport)
    run = _Backward(spec, plan, schedule, transport, q, k, v, out, lse, dout)
    yield from run.steps()
    grads = [grad.to(q.dtype) for grad in (run.dq, run.dk, run.dv)]
    if spec.grid.heads > 1:
        num_heads = [q.shape[2] * spec.grid.heads, num_kv_heads, num_kv_heads]
        grads = yield from heads_for_tokens(grads, num_heads, plan, schedule, transport)
    dq, dk, dv = grads
    return dq, dk, dv


class _Run(ABC):
    """Pass of one rank over the query x kv grid, after its tokens have been traded for heads."""

    own: dict[Side, list[Tensor]]
    """Tensors of the position's own queries and keys, `[b, s, ...]`."""
    home: dict[Side, list[Tensor]]
    """Sums of the results for the own shares, fp32 `[b, s, ...]`; a side without results has none."""
    narrow: torch.dtype
    """Dtype in which partial results travel, unless they are summed on their way."""

    def __init__(self, spec: AttentionSpec, plan: RankPlan, schedule: Schedule, transport: Transport) -> None:
        self.spec, self.plan, self.layouts, self.transport = spec, plan, schedule.layouts, transport
        self.routes: dict[Flow, str] = {
            "query_results": spec.grid.query_route,
            "key_results": spec.grid.kv_route,
        }
        self.held: dict[Share, tuple[list[Tensor], Rows]] = {}  # foreign shares, with the rows that were sent of them
        self.partial: dict[Share, list[Tensor]] = {}  # sums of results for foreign shares
        self.travelling: dict[Message, list[Tensor]] = {}  # buffers, from post to wait

    @abstractmethod
    def compute(
        self, queries: list[Tensor], keys: list[Tensor], into: tuple[list[Tensor], list[Tensor]], mask: Mask
    ) -> None:
        """Compute one tile and add it to the results `into` for its queries and for its keys, `[b, rows, ...]`."""

    @abstractmethod
    def merge(self, into: list[Tensor], part: list[Tensor]) -> None:
        """Merge a partial result into `into`, which holds the same rows."""

    @abstractmethod
    def nothing(self, like: list[Tensor]) -> list[Tensor]:
        """Return the neutral element of `merge`, with shapes and dtypes of `like`."""

    def steps(self) -> Iterator[Message]:
        """Run all steps; yields each message that must be waited for, in the order of the plan."""
        for step in self.plan.steps:
            for exchange in step.exchanges():
                # Every wait of the exchange comes before its posts: both ends of a message keep this order.
                for message in filter(_of_the_grid, exchange.due):
                    yield message
                    self._take(message)
                for message in filter(_of_the_grid, exchange.sent):
                    yield message
                    del self.travelling[message]
                # After the merges above: a partial result that is sent now holds all that has come for it.
                receives = {message: self._buffers(message) for message in filter(_of_the_grid, exchange.receives)}
                sends = {message: self._contents(message) for message in filter(_of_the_grid, exchange.sends)}
                self.travelling |= receives | sends
                self.transport.post(sends, receives)
            if step.tile is not None:
                self._compute(step.tile)
            for share in step.done:
                del self.held[share]
        assert not self.held and not self.partial and not self.travelling, "the plan frees everything"

    def _compute(self, tile: Tile) -> None:
        """Compute a tile from views of the shares into views of the results."""
        queries, keys = Share("queries", tile.query_owner), Share("keys", tile.key_owner)
        masks = self.spec.masks
        if tile not in masks:
            masks[tile] = mask_of(tile, self.layouts, self.spec.visibility, self.own["queries"][0].device)
        self.compute(
            self._rows_of(queries, tile.query_rows),
            self._rows_of(keys, tile.key_rows),
            (self._results_for(queries, tile.query_rows), self._results_for(keys, tile.key_rows)),
            masks[tile],
        )

    def _rows_of(self, share: Share, rows: Rows) -> list[Tensor]:
        """Return views of rows of a share, own or foreign."""
        # held[0] is the row of the share at which the tensors begin: 0 for the own share.
        tensors, held = (self.own[share.side], (0, 0)) if share.owner == self.plan.position else self.held[share]
        return _cut(tensors, rows, held[0])

    def _results_for(self, share: Share, rows: Rows) -> list[Tensor]:
        """Return views of rows of the results for a share, own or foreign; foreign ones are made at their first use."""
        home = self.home[share.side]
        if share.owner == self.plan.position:
            return _cut(home, rows, 0)
        if not home:
            return []
        start, stop = self.plan.results[share]
        if share not in self.partial:
            # [b, 1, ...] -> [b, rows, ...] without memory: `nothing` reads shape and dtype only.
            self.partial[share] = self.nothing([x[:, :1].expand(-1, stop - start, *x.shape[2:]) for x in home])
        return _cut(self.partial[share], rows, start)

    def _take(self, message: Message) -> None:
        """Keep a share that has arrived, or merge a result that has arrived."""
        tensors = self.travelling.pop(message)
        if message.flow in ("queries", "keys"):
            self.held[Share(message.flow, message.owner)] = (tensors, message.rows)
        else:
            self.merge(self._results_for(_share_of(message), message.rows), tensors)

    def _contents(self, message: Message) -> list[Tensor]:
        """Return the tensors to send, contiguous `[b, rows, ...]`."""
        # A share is sent from where it lies; a result leaves once, complete, and its sum is freed.
        if message.flow in ("queries", "keys"):
            return [x.contiguous() for x in self._rows_of(_share_of(message), message.rows)]
        tensors = self.partial.pop(_share_of(message))
        return [x.to(y).contiguous() for x, y in zip(tensors, self._dtypes(message), strict=True)]

    def _buffers(self, message: Message) -> list[Tensor]:
        """Return empty tensors to receive into, `[b, rows, ...]`."""
        side = _share_of(message).side
        like = self.home[side] if message.is_result else self.own[side]
        dtypes = self._dtypes(message) if message.is_result else [x.dtype for x in like]
        num_rows = message.rows[1] - message.rows[0]
        return [
            torch.empty((x.shape[0], num_rows, *x.shape[2:]), dtype=dtype, device=x.device)
            for x, dtype in zip(like, dtypes, strict=True)
        ]

    def _dtypes(self, message: Message) -> list[torch.dtype]:
        """Return the dtypes of a message of results: sums that grow on their way are not rounded, and lse never is."""
        home = self.home[_share_of(message).side]
        wide = self.routes[message.flow] == "round" or not self.spec.narrow_results
        return [x.dtype if wide or x.dim() == 3 else self.narrow for x in home]  # lse alone is [b, s, h]


class _Forward(_Run):
    """Forward of one rank: results for queries are (out, lse), merged by lse; keys have no results."""

    def __init__(
        self,
        spec: AttentionSpec,
        plan: RankPlan,
        schedule: Schedule,
        transport: Transport,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> None:
        super().__init__(spec, plan, schedule, transport)
        b, s, h, _ = q.shape
        self.out = zeros_fp32(q)
        # Neutral for the kernels' running softmax: out = 0, lse = -inf.
        self.lse = torch.full((b, h, s), -torch.inf, dtype=self.out.dtype, device=q.device)
        self.own = {"queries": [q], "keys": [k, v]}
        self.home = {"queries": [self.out, self.lse.transpose(1, 2)], "keys": []}
        self.narrow = q.dtype

    def compute(self, queries, keys, into, mask):
        (q,), (k, v), ((out, lse), _) = queries, keys, into
        # lse [b, rows, h] is a view of the kernels' [b, h, rows]: transposed back, it is extended in place.
        attention_forward(q, k, v, mask, running=(out, lse.transpose(1, 2)), backend=self.spec.backend)

    def merge(self, into, part):
        (out, lse), (part_out, part_lse) = into, part
        # One part: [None] is the dim over which merge_ goes.
        merge_(out, lse.transpose(1, 2), part_out[None], part_lse.transpose(1, 2)[None])

    def nothing(self, like):
        out, lse = like
        # Contiguous as [b, h, rows], the order in which the kernels address lse.
        empty = torch.full_like(lse.transpose(1, 2), -torch.inf, memory_format=torch.contiguous_format)
        return [torch.zeros_like(out, memory_format=torch.contiguous_format), empty.transpose(1, 2)]


class _Backward(_Run):
    """Backward of one rank: results are dQ for queries and (dK, dV) for keys, merged by addition."""

    def __init__(
        self, spec: AttentionSpec, plan: RankPlan, schedule: Schedule, transport: Transport,
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor,
    ) -> None:  # fmt: skip
        super().__init__(spec, plan, schedule, transport)
        delta = row_delta(dout, out)  # [b, h, s]
        self.dq, self.dk, self.dv = zeros_fp32(q), zeros_fp32(k), zeros_fp32(v)
        self.own = {"queries": [q, dout, lse.transpose(1, 2), delta.transpose(1, 2)], "keys": [k, v]}
        self.home = {"queries": [self.dq], "keys": [self.dk, self.dv]}
        self.narrow = q.dtype

    def compute(self, queries, keys, into, mask):
        (q, dout, lse, delta), (k, v), ((dq,), (dk, dv)) = queries, keys, into
        attention_backward(
            dout, q, k, v, lse.transpose(1, 2), delta.transpose(1, 2), mask,
            into=(dq, dk, dv), backend=self.spec.backend,
        )  # fmt: skip

    def merge(self, into, part):
        for total, x in zip(into, part, strict=True):
            total.add_(x)

    def nothing(self, like):
        return [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in like]


def _of_the_grid(message: Message) -> bool:
    """Return whether a message belongs to the query x kv grid; `heads` handles the others."""
    return message.flow not in ("to_heads", "from_heads")


def _share_of(message: Message) -> Share:
    """Return the share that a message carries, or for which it carries results."""
    return Share("queries" if message.flow in ("queries", "query_results") else "keys", message.owner)


def _cut(tensors: list[Tensor], rows: Rows, first: int) -> list[Tensor]:
    """Return views of rows [start, stop) of a share, from tensors `[b, s, ...]` whose row 0 is row `first` of it."""
    return [x[:, rows[0] - first : rows[1] - first] for x in tensors]
