"""What a plan costs on a topology: all its ranks are played, step by step.

A rank begins a step when its tile of the step before is computed and the messages due have come. A message begins when
both its ends have posted it and its links have carried what was posted before; messages posted together that share a
link share it evenly. That is how gloo and NCCL behave when every channel is a stream of its own, as far as a
model of a few lines can say it: `benchmarks/cp_network.py` sets it beside measured times.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import NamedTuple

from .grid import CpGrid
from .plan import Block, Message, Pass, RankPlan, Tile
from .schedules import Schedule
from .topology import Path, Topology
from .visible import Sight, num_pairs

BLOCKS = ("queries", "keys")
RESULTS = ("query_results", "key_results")


@dataclass(frozen=True)
class Work:
    """One layer's attention: sizes of what a rank holds and sends. Heads are those of one tensor-parallel rank."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int = 2
    """Bytes of a number of q, k, v."""
    batch: int = 1
    narrow_results: bool = True

    def bytes_of(self, message: Message, grid: CpGrid, direction: Pass) -> int:
        """What a message weighs."""
        heads = self.num_heads // grid.heads
        kv_heads = max(1, self.num_kv_heads // grid.heads)
        q, kv = heads * self.head_dim, 2 * kv_heads * self.head_dim
        wide = max(self.itemsize, 4)

        def partial_itemsize(route: str) -> int:
            return self.itemsize if self.narrow_results and route != "round" else wide

        a_row = {
            "queries": q * self.itemsize if direction == "forward" else 2 * q * self.itemsize + 2 * heads * wide,
            "keys": kv * self.itemsize,
            "query_results": q * partial_itemsize(grid.query_route) + (heads * wide if direction == "forward" else 0),
            "key_results": kv * partial_itemsize(grid.kv_route),
            "to_heads": (q + kv if direction == "forward" else q) * self.itemsize,
            "from_heads": (q if direction == "forward" else q + kv) * self.itemsize,
        }[message.flow]
        return self.batch * (message.rows[1] - message.rows[0]) * a_row


@dataclass(frozen=True)
class Speed:
    """How fast a rank computes tiles."""

    forward_flops: float
    """Floating-point operations a second: 4 x head_dim for each head and visible pair."""
    backward_flops: float
    """The same of the backward: 10 x head_dim for each head and visible pair."""
    tile_s: float = 0.0
    """What a tile takes besides."""

    def seconds(self, pairs: int, work: Work, grid: CpGrid, direction: Pass) -> float:
        """What a tile of so many visible pairs takes."""
        flops, rate = (4, self.forward_flops) if direction == "forward" else (10, self.backward_flops)
        return self.tile_s + work.batch * pairs * flops * work.head_dim * (work.num_heads // grid.heads) / rate


ASSUMED = Speed(forward_flops=500e12, backward_flops=350e12, tile_s=10e-6)
"""Of an H100 in bf16 where nothing was measured: round numbers below those of FlashAttention-3 (arXiv 2407.08608)."""


class Event(NamedTuple):
    """Something a rank does in a played plan, or did in a run."""

    rank: int
    what: Tile | Message
    start_s: float
    stop_s: float


@dataclass(frozen=True)
class Price:
    """What playing a pass says."""

    seconds: float
    compute_s: float
    """Of the rank that computes longest."""
    bytes_by_link: dict[Hashable, int]
    peak_bytes: int
    """Most that a rank holds at a time of others' blocks, and of results that it sums up for them or that travel."""
    events: list[Event] = field(repr=False, default_factory=list)

    @property
    def exposed_s(self) -> float:
        """Time in which no rank that computes longest computes: communication that nothing hides."""
        return self.seconds - self.compute_s


def play(schedule: Schedule, sight: Sight, topology: Topology, work: Work, speed: Speed) -> Price:
    """Play all ranks of a schedule."""
    grid, direction = schedule.grid, schedule.direction
    plans = schedule.plans()
    path = _remembered(partial(topology.path, grid.size))
    ready = [0.0] * grid.size
    compute_s = [0.0] * grid.size
    arrival: dict[Message, float] = {}
    free: dict[Hashable, float] = defaultdict(float)
    carried: dict[Hashable, int] = defaultdict(int)
    events: list[Event] = []
    for number in range(max(len(plan.steps) for plan in plans)):
        steps = [(plan.rank, plan.steps[number]) for plan in plans if number < len(plan.steps)]
        for half in (0, 1):
            exchanges = [(rank, step.exchanges()[half]) for rank, step in steps]
            for rank, exchange in exchanges:
                ready[rank] = max([ready[rank], *(arrival[message] for message in (*exchange.due, *exchange.gone))])
            posted = {m: max(ready[m.source], ready[m.target]) for _, exchange in exchanges for m in exchange.sends}
            arrival |= _carry(
                posted, path, partial(work.bytes_of, grid=grid, direction=direction), free, carried, events
            )
        for rank, step in steps:
            if step.tile is None:
                continue
            queries, keys = schedule.layouts[step.tile.query_owner], schedule.layouts[step.tile.key_owner]
            seconds = speed.seconds(num_pairs(queries, keys, sight), work, grid, direction)
            events.append(Event(rank, step.tile, ready[rank], ready[rank] + seconds))
            ready[rank] += seconds
            compute_s[rank] += seconds
    peak = max(_peak_bytes(plan, work, grid, direction) for plan in plans)
    return Price(max(ready), max(compute_s), dict(carried), peak, events)


def _carry(
    posted: dict[Message, float],
    path: Callable[[int, int], Path],
    bytes_of: Callable[[Message], int],
    free: dict[Hashable, float],
    carried: dict[Hashable, int],
    events: list[Event],
) -> dict[Message, float]:
    """When the messages of a step arrive; `free` tells when each link has carried all that was posted before."""
    on_link: dict[Hashable, list[int]] = defaultdict(list)
    weights = {message: bytes_of(message) for message in posted}
    begins: dict[Message, float] = {}
    for message, at in posted.items():
        links = path(message.source, message.target).links
        begins[message] = max([at, *(free[link] for link in links)])
        for link in links:
            on_link[link].append(weights[message])
            carried[link] += weights[message]
    arrival = {}
    until: dict[Hashable, float] = defaultdict(float)
    for message, begin in begins.items():
        links, bytes_per_s, latency_s = path(message.source, message.target)
        # Shared evenly, a message is through when each of the others has sent as much, or is through itself.
        shared = max(sum(min(weights[message], other) for other in on_link[link]) for link in links)
        stop = begin + shared / bytes_per_s
        arrival[message] = stop + latency_s
        for link in links:
            until[link] = max(until[link], stop)
        events.append(Event(message.source, message, begin, stop + latency_s))
    free |= until
    return arrival


def _peak_bytes(plan: RankPlan, work: Work, grid: CpGrid, direction: Pass) -> int:
    """Of blocks from their post to their last use, or until those they are passed on to have them; of partial results
    from their first tile, in fp32, to their post; and of results on their way from their post to their merge."""
    change = [0] * (len(plan.steps) + 1)
    weight: dict[Block, int] = {}
    begun: dict[Block, int] = {}
    passed_on: dict[Block, int] = {}
    for number, step in enumerate(plan.steps):
        for message in step.due:
            if message.flow in RESULTS:
                begun.setdefault(_block(message), number)
        for message in step.receives:
            size = work.bytes_of(message, grid, direction)
            change[number] += size
            if message.flow in BLOCKS:
                weight[_block(message)] = size
            else:
                change[message.due] -= size
        for message in step.sends:
            if message.flow in BLOCKS:
                passed_on[_block(message)] = message.due
                continue
            size = work.bytes_of(message, grid, direction)
            change[number] += size
            change[message.due] -= size
            if message.flow in RESULTS:
                size = replace(work, narrow_results=False).bytes_of(message, grid, direction)
                change[begun[_block(message)]] += size
                change[number] -= size
        if step.tile is not None:
            for block in (Block("queries", step.tile.query_owner), Block("keys", step.tile.key_owner)):
                begun.setdefault(block, number)
        for block in step.done:
            change[max(number + 1, passed_on.get(block, 0))] -= weight[block]
    return max(accumulate(change))


def _block(message: Message) -> Block:
    """The block that a message carries, or carries results for."""
    return Block("queries" if message.flow in ("queries", "query_results") else "keys", message.owner)


def _remembered(path: Callable[[int, int], Path]) -> Callable[[int, int], Path]:
    known: dict[tuple[int, int], Path] = {}

    def find(source: int, target: int) -> Path:
        if (source, target) not in known:
            known[source, target] = path(source, target)
        return known[source, target]

    return find
