"""Runs a rank's part of a plan, forward and backward, over any transport.

A pass is a generator: it yields each message at the moment it must wait for it, and who drives it does the waiting
(`transports`). So one process can run all ranks of a plan in turn, by the same code as a cluster.

Tensors that travel, and those that sum up what has travelled, have their sequence on dim 1; lse and delta, which the
kernels hold as `[b, h, s]`, are seen through a transposed view.
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
from .plan import Block, Flow, Message, Pass, RankPlan, Side, Tile
from .schedules import Schedule
from .transports import Transport
from .visible import Rows, Sight


@dataclass(frozen=True, eq=False)
class Problem:
    """One attention over a sequence that several ranks hold: what all of them agree on.

    Plans and masks are made once for all layers and passes that share the problem: keep it while its documents last.
    """

    grid: CpGrid
    layouts: tuple[SeqLayout, ...]
    """By rank."""
    sight: Sight
    backend: str = "auto"
    narrow_results: bool = True
    """Partial results that go straight home travel in the inputs' dtype; False: in fp32. They are summed in fp32."""
    masks: dict[Tile, Mask] = field(default_factory=dict, repr=False)
    """Of the tiles computed so far, on the device of their first tensors."""
    _made: dict[tuple[Pass, int], tuple[Schedule, RankPlan]] = field(default_factory=dict, repr=False)

    def plan(self, direction: Pass, rank: int) -> tuple[Schedule, RankPlan]:
        """The schedule of a pass, and a rank's part of it."""
        if (direction, rank) not in self._made:
            schedule = Schedule(self.grid, self.layouts, self.sight, direction)
            self._made[direction, rank] = (schedule, schedule.plan(rank))
        return self._made[direction, rank]


def mask_of(tile: Tile, layouts: Sequence[SeqLayout], sight: Sight, device: torch.device | str) -> Mask:
    """The mask of a tile, `layouts` by place."""
    queries = layouts[tile.query_owner].part(*tile.query_rows)
    keys = layouts[tile.key_owner].part(*tile.key_rows)
    return make_mask(queries, keys, causal=sight.causal, window=sight.window, device=device)


Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""q, k, v, out, lse of a rank's share of heads, over the tokens of its place: all that the backward needs."""


def forward(
    problem: Problem, rank: int, q: Tensor, k: Tensor, v: Tensor, transport: Transport
) -> Generator[Message, None, tuple[Tensor, Saved]]:
    """out like q, for this rank's tokens, and what to save. q, k, v: see `attention.context_attention`."""
    schedule, plan = problem.plan("forward", rank)
    if problem.grid.heads > 1:
        q, k, v = yield from tokens_for_heads([q, k, v], plan, schedule, transport)
    run = _Forward(problem, plan, schedule, transport, q, k, v)
    yield from run.steps()
    out, lse = run.out.to(q.dtype), run.lse
    saved = (q, k, v, out, lse)
    if problem.grid.heads > 1:
        (out,) = yield from heads_for_tokens([out], [q.shape[2] * problem.grid.heads], plan, schedule, transport)
    return out, saved


def backward(
    problem: Problem, rank: int, dout: Tensor, saved: Saved, num_kv_heads: int, transport: Transport
) -> Generator[Message, None, tuple[Tensor, Tensor, Tensor]]:
    """dq, dk, dv for this rank's tokens, all heads."""
    schedule, plan = problem.plan("backward", rank)
    q, k, v, out, lse = saved
    if problem.grid.heads > 1:
        (dout,) = yield from tokens_for_heads([dout], plan, schedule, transport)
    run = _Backward(problem, plan, schedule, transport, q, k, v, out, lse, dout)
    yield from run.steps()
    grads = [grad.to(q.dtype) for grad in (run.dq, run.dk, run.dv)]
    if problem.grid.heads > 1:
        num_heads = [q.shape[2] * problem.grid.heads, num_kv_heads, num_kv_heads]
        grads = yield from heads_for_tokens(grads, num_heads, plan, schedule, transport)
    dq, dk, dv = grads
    return dq, dk, dv


class _Run(ABC):
    """One pass of one rank over the query x kv grid."""

    own: dict[Side, list[Tensor]]
    """This place's blocks."""
    home: dict[Side, list[Tensor]]
    """Where the results for them are summed, in fp32."""
    narrow: torch.dtype
    """Of results that go straight home."""

    def __init__(self, problem: Problem, plan: RankPlan, schedule: Schedule, transport: Transport) -> None:
        self.problem, self.plan, self.layouts, self.transport = problem, plan, schedule.layouts, transport
        self.routes: dict[Flow, str] = {
            "query_results": problem.grid.query_route,
            "key_results": problem.grid.kv_route,
        }
        self.held: dict[Block, tuple[list[Tensor], Rows]] = {}
        self.partial: dict[Block, list[Tensor]] = {}
        self.travelling: dict[Message, list[Tensor]] = {}

    @abstractmethod
    def compute(
        self, queries: list[Tensor], keys: list[Tensor], into: tuple[list[Tensor], list[Tensor]], mask: Mask
    ) -> None:
        """One tile, added into the results for its queries and its keys."""

    @abstractmethod
    def merge(self, into: list[Tensor], part: list[Tensor]) -> None:
        """Add a partial result for the same rows."""

    @abstractmethod
    def nothing(self, like: list[Tensor]) -> list[Tensor]:
        """A partial result that is the neutral element of `merge`."""

    def steps(self) -> Iterator[Message]:
        """Yields what must be waited for, in order."""
        for step in self.plan.steps:
            for exchange in step.exchanges():
                for message in filter(_of_the_grid, exchange.due):
                    yield message
                    self._take(message)
                for message in filter(_of_the_grid, exchange.gone):
                    yield message
                    del self.travelling[message]
                receives = {message: self._buffers(message) for message in filter(_of_the_grid, exchange.receives)}
                sends = {message: self._contents(message) for message in filter(_of_the_grid, exchange.sends)}
                self.travelling |= receives | sends
                self.transport.post(sends, receives)
            if step.tile is not None:
                self._compute(step.tile)
            for block in step.done:
                del self.held[block]
        assert not self.held and not self.partial and not self.travelling, "the plan lets go of everything"

    def _compute(self, tile: Tile) -> None:
        queries, keys = Block("queries", tile.query_owner), Block("keys", tile.key_owner)
        masks = self.problem.masks
        if tile not in masks:
            masks[tile] = mask_of(tile, self.layouts, self.problem.sight, self.own["queries"][0].device)
        self.compute(
            self._rows_of(queries, tile.query_rows),
            self._rows_of(keys, tile.key_rows),
            (self._results_for(queries, tile.query_rows), self._results_for(keys, tile.key_rows)),
            masks[tile],
        )

    def _rows_of(self, block: Block, rows: Rows) -> list[Tensor]:
        tensors, held = (self.own[block.side], (0, 0)) if block.owner == self.plan.place else self.held[block]
        return _cut(tensors, rows, held[0])

    def _results_for(self, block: Block, rows: Rows) -> list[Tensor]:
        """Views of the rows of what this place sums up for a block, its own or another's."""
        home = self.home[block.side]
        if block.owner == self.plan.place:
            return _cut(home, rows, 0)
        if not home:
            return []
        start, stop = self.plan.results[block]
        if block not in self.partial:
            self.partial[block] = self.nothing([x[:, :1].expand(-1, stop - start, *x.shape[2:]) for x in home])
        return _cut(self.partial[block], rows, start)

    def _take(self, message: Message) -> None:
        tensors = self.travelling.pop(message)
        if message.flow in ("queries", "keys"):
            self.held[Block(message.flow, message.owner)] = (tensors, message.rows)
        else:
            self.merge(self._results_for(_block(message), message.rows), tensors)

    def _contents(self, message: Message) -> list[Tensor]:
        if message.flow in ("queries", "keys"):
            return [x.contiguous() for x in self._rows_of(_block(message), message.rows)]
        tensors = self.partial.pop(_block(message))
        return [x.to(y).contiguous() for x, y in zip(tensors, self._dtypes(message), strict=True)]

    def _buffers(self, message: Message) -> list[Tensor]:
        side = _block(message).side
        like = self.home[side] if message.is_result else self.own[side]
        dtypes = self._dtypes(message) if message.is_result else [x.dtype for x in like]
        num_rows = message.rows[1] - message.rows[0]
        return [
            torch.empty((x.shape[0], num_rows, *x.shape[2:]), dtype=dtype, device=x.device)
            for x, dtype in zip(like, dtypes, strict=True)
        ]

    def _dtypes(self, message: Message) -> list[torch.dtype]:
        """Of a message of results: those that grow on their way must not be rounded at each stop, and lse never."""
        home = self.home[_block(message).side]
        wide = self.routes[message.flow] == "round" or not self.problem.narrow_results
        return [x.dtype if wide or x.dim() == 3 else self.narrow for x in home]


class _Forward(_Run):
    def __init__(
        self,
        problem: Problem,
        plan: RankPlan,
        schedule: Schedule,
        transport: Transport,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> None:
        super().__init__(problem, plan, schedule, transport)
        b, s, h, _ = q.shape
        self.out = zeros_fp32(q)
        self.lse = torch.full((b, h, s), -torch.inf, dtype=self.out.dtype, device=q.device)
        self.own = {"queries": [q], "keys": [k, v]}
        self.home = {"queries": [self.out, self.lse.transpose(1, 2)], "keys": []}
        self.narrow = q.dtype

    def compute(self, queries, keys, into, mask):
        (q,), (k, v), ((out, lse), _) = queries, keys, into
        attention_forward(q, k, v, mask, running=(out, lse.transpose(1, 2)), backend=self.problem.backend)

    def merge(self, into, part):
        (out, lse), (part_out, part_lse) = into, part
        merge_(out, lse.transpose(1, 2), part_out[None], part_lse.transpose(1, 2)[None])

    def nothing(self, like):
        out, lse = like
        empty = torch.full_like(lse.transpose(1, 2), -torch.inf, memory_format=torch.contiguous_format)
        return [torch.zeros_like(out, memory_format=torch.contiguous_format), empty.transpose(1, 2)]


class _Backward(_Run):
    def __init__(
        self, problem: Problem, plan: RankPlan, schedule: Schedule, transport: Transport,
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor,
    ) -> None:  # fmt: skip
        super().__init__(problem, plan, schedule, transport)
        delta = row_delta(dout, out)
        self.dq, self.dk, self.dv = zeros_fp32(q), zeros_fp32(k), zeros_fp32(v)
        self.own = {"queries": [q, dout, lse.transpose(1, 2), delta.transpose(1, 2)], "keys": [k, v]}
        self.home = {"queries": [self.dq], "keys": [self.dk, self.dv]}
        self.narrow = q.dtype

    def compute(self, queries, keys, into, mask):
        (q, dout, lse, delta), (k, v), ((dq,), (dk, dv)) = queries, keys, into
        attention_backward(
            dout, q, k, v, lse.transpose(1, 2), delta.transpose(1, 2), mask,
            into=(dq, dk, dv), backend=self.problem.backend,
        )  # fmt: skip

    def merge(self, into, part):
        for total, x in zip(into, part, strict=True):
            total.add_(x)

    def nothing(self, like):
        return [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in like]


def _of_the_grid(message: Message) -> bool:
    """Heads are traded before and after, by `heads`."""
    return message.flow not in ("to_heads", "from_heads")


def _block(message: Message) -> Block:
    """The block that a message carries, or carries results for."""
    return Block("queries" if message.flow in ("queries", "query_results") else "keys", message.owner)


def _cut(tensors: list[Tensor], rows: Rows, first: int) -> list[Tensor]:
    """Views of rows [start, stop) of a block of which the tensors hold those from `first` on."""
    return [x[:, rows[0] - first : rows[1] - first] for x in tensors]
