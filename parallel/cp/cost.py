"""What a plan costs on a topology: all its ranks are played, step by step.

A rank begins a step when its tile of the step before is computed and the messages due have come. A message begins when
both its ends have posted it and its links have carried what was posted before; messages posted together that share a
link share it evenly. That is how gloo and NCCL behave when every channel is a stream of its own, as far as a
model of a few lines can say it: `benchmarks/cp_lab_network.py` sets it beside measured times.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .grid import CpGrid
from .plan import FLOWS, Message, Messages, Pass, Tile
from .schedules import Schedule
from .topology import Topology
from .visible import Ints, Sight, num_pairs

Floats = NDArray[np.float64]


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
        return (
            self.batch
            * (message.rows[1] - message.rows[0])
            * int(self.row_bytes(grid, direction)[FLOWS.index(message.flow)])
        )

    def row_bytes(self, grid: CpGrid, direction: Pass) -> Ints:
        """What a row weighs in a message, by flow in the order of `FLOWS`."""
        heads = self.num_heads // grid.heads
        kv_heads = max(1, self.num_kv_heads // grid.heads)
        q, kv = heads * self.head_dim, 2 * kv_heads * self.head_dim
        wide = max(self.itemsize, 4)

        def partial_itemsize(route: str) -> int:
            return self.itemsize if self.narrow_results and route != "round" else wide

        of_flow = {
            "queries": q * self.itemsize if direction == "forward" else 2 * q * self.itemsize + 2 * heads * wide,
            "keys": kv * self.itemsize,
            "query_results": q * partial_itemsize(grid.query_route) + (heads * wide if direction == "forward" else 0),
            "key_results": kv * partial_itemsize(grid.kv_route),
            "to_heads": (q + kv if direction == "forward" else q) * self.itemsize,
            "from_heads": (q if direction == "forward" else q + kv) * self.itemsize,
        }
        return np.array([of_flow[flow] for flow in FLOWS])


@dataclass(frozen=True)
class Speed:
    """How fast a rank computes tiles."""

    forward_flops: float
    """Floating-point operations a second: 4 x head_dim for each head and visible pair."""
    backward_flops: float
    """The same of the backward: 10 x head_dim for each head and visible pair."""
    tile_s: float = 0.0
    """What a tile takes besides."""

    def seconds(self, pairs: Ints, work: Work, grid: CpGrid, direction: Pass) -> Floats:
        """What tiles of so many visible pairs take."""
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
    sent_bytes: int
    """By all ranks; over several links a message counts once."""
    peak_bytes: int
    """Most that a rank holds at a time of others' blocks, and of results that it sums up for them or that travel."""
    events: list[Event] = field(repr=False, default_factory=list)

    @property
    def exposed_s(self) -> float:
        """Time in which no rank that computes longest computes: communication that nothing hides."""
        return self.seconds - self.compute_s


def play(
    schedule: Schedule, sight: Sight, topology: Topology, work: Work, speed: Speed, *, record: bool = False
) -> Price:
    """Play all ranks of a schedule; with `record` the price has the events, a message's at both of its ends."""
    grid, size = schedule.grid, schedule.grid.size
    messages = schedule.all_messages
    num_steps = int(max(schedule.end, messages.due.max(initial=0) + 1))
    # A step has two exchanges, of results and then of blocks: half 2 x step and the one after.
    messages = messages.where(np.argsort(2 * messages.posted + ~messages.is_result, kind="stable"))
    posted, due = (2 * at + ~messages.is_result for at in (messages.posted, messages.due))
    by_due = np.argsort(due, kind="stable")
    posted_at, due_at = (np.searchsorted(at, np.arange(2 * num_steps + 1)).tolist() for at in (posted, due[by_due]))
    rows = (messages.stop - messages.start) * work.batch
    weights = work.row_bytes(grid, schedule.direction)[messages.flow] * rows
    wide = replace(work, narrow_results=False).row_bytes(grid, schedule.direction)[messages.flow] * rows
    wires, pair = wires_of(topology, size), messages.source * size + messages.target
    ready, compute_s, free = np.zeros(size), np.zeros(size), np.zeros(len(wires.names) + 1)
    begins, arrival = np.zeros((2, len(pair)))
    tiles: dict[int, tuple[Floats, Floats]] = {}  # by step: from when to when
    holds = _Holds(messages, weights, wide, grid, num_steps)
    for half in range(2 * num_steps):
        came = by_due[due_at[half] : due_at[half + 1]]
        for end in (messages.source, messages.target) if len(came) else ():
            np.maximum.at(ready, end[came], arrival[came])
        now, step = slice(posted_at[half], posted_at[half + 1]), half // 2
        if now.start < now.stop:
            begins[now] = np.maximum(ready[messages.source[now]], ready[messages.target[now]])
            begins[now], arrival[now] = _carry(begins[now], weights[now], pair[now], wires, free)
        if half % 2 and 0 <= step - schedule.first < len(schedule.tile_numbers):
            query, key = schedule.tiles(step, np.arange(grid.places))
            pairs = num_pairs(schedule.shares[query], schedule.shares[key], sight)
            holds.use(step, query, key, pairs > 0)
            seconds = np.where(pairs > 0, speed.seconds(pairs, work, grid, schedule.direction), 0).repeat(grid.heads)
            compute_s += seconds
            tiles[step] = ready, ready + seconds
            ready = ready + seconds
    on_link = np.bincount(wires.links[pair].ravel(), weights.repeat(wires.links.shape[1]), len(free))
    return Price(
        float(ready.max()),
        float(compute_s.max()),
        {name: int(carried) for name, carried in zip(wires.names, on_link, strict=False) if carried},
        int(weights.sum()),
        holds.peak_bytes(),
        _events(schedule, messages, begins, arrival, tiles) if record else [],
    )


class Wires(NamedTuple):
    """What messages between every two ranks occupy; a pair's place in the arrays is source x ranks + target."""

    names: list[Hashable]
    links: NDArray[np.int32]
    """`[pairs, most links of any]`, places in `names`, or its length where there are fewer."""
    bytes_per_s: Floats
    latency_s: Floats


@lru_cache(maxsize=8)
def wires_of(topology: Topology, size: int) -> Wires:
    """Of `size` ranks. Kept, since all plans on a topology share it and 1,024 ranks have a million pairs."""
    numbers: dict[Hashable, int] = {}
    found: list[list[int]] = []
    rates, latencies = np.ones(size**2), np.zeros(size**2)
    for pair in range(size**2):
        source, target = divmod(pair, size)
        found.append([])
        if source != target:
            links, rates[pair], latencies[pair] = topology.path(size, source, target)
            found[pair] = [numbers.setdefault(link, len(numbers)) for link in links]
    wide = np.full((size**2, max(map(len, found))), len(numbers), np.int32)
    for pair, of_pair in enumerate(found):
        wide[pair, : len(of_pair)] = of_pair
    return Wires(list(numbers), wide, rates, latencies)


def _carry(
    posted: Floats, weights: NDArray[np.int64], pair: NDArray[np.int64], wires: Wires, free: Floats
) -> tuple[Floats, Floats]:
    """When the messages of a step begin and arrive; `free` tells when each link has carried all that was posted."""
    links = wires.links[pair]
    begins = np.maximum(posted, free[links].max(axis=1, initial=0))
    # Shared evenly, a message is through when each of the others has sent as much, or is through itself: with the
    # messages of a link in order of weight, after all lighter ones and as many times its weight as there are heavier.
    flat, heavy = links.ravel(), weights.repeat(links.shape[1])
    order = np.lexsort((heavy, flat))
    first = np.searchsorted(flat[order], flat[order])
    sums, total = np.cumsum(heavy[order]), np.bincount(flat, minlength=len(free))[flat[order]]
    lighter = sums - heavy[order] - (sums - heavy[order])[first]
    shared = np.empty(len(flat))
    shared[order] = lighter + heavy[order] * (total - (np.arange(len(flat)) - first))
    shared[flat == len(wires.names)] = 0
    through = begins + shared.reshape(links.shape).max(axis=1, initial=0) / wires.bytes_per_s[pair]
    np.maximum.at(free, flat, through.repeat(links.shape[1]))
    free[-1] = 0
    return begins, through + wires.latency_s[pair]


class _Holds:
    """What ranks hold of others: a block from its post to its last use, or until those it is passed on to have it; a
    result from its post to its merge, and before that, in fp32, from its first tile.
    """

    def __init__(
        self, messages: Messages, weights: NDArray[np.int64], wide: NDArray[np.int64], grid: CpGrid, num_steps: int
    ) -> None:
        self.messages, self.weights, self.wide, self.heads = messages, weights, wide, grid.heads
        self.change = np.zeros((num_steps + 1, grid.size), np.int64)
        self.last = np.zeros((2, grid.places, grid.places), np.int32)
        """Step of a place's last use of an owner's block, by side."""
        self.begun = np.full((2, grid.places, grid.places), num_steps, np.int32)
        """Step at which a place begins to sum up results for an owner's block, by side."""

    def use(self, step: int, query: Ints, key: Ints, used: NDArray[np.bool_]) -> None:
        """Places compute tiles of these owners' blocks."""
        places = np.arange(len(query))[used]
        for side, owner in enumerate((query[used], key[used])):
            self.last[side, places, owner] = step
            np.minimum.at(self.begun[side], (places, owner), step)

    def peak_bytes(self) -> int:
        """Of the rank that holds most."""
        flow, owner, _, _, source, target, posted, due = self.messages
        block = (flow == FLOWS.index("queries")) | (flow == FLOWS.index("keys"))
        for end, step in ((target, due), (source, due - 1)):
            np.maximum.at(self.last, (flow[block], end[block] // self.heads, owner[block]), step[block])
        until = due.copy()
        until[block] = self.last[flow[block], target[block] // self.heads, owner[block]] + 1
        for end, held in ((target, slice(None)), (source, ~block)):
            np.add.at(self.change, (posted[held], end[held]), self.weights[held])
            np.add.at(self.change, (until[held], end[held]), -self.weights[held])
        result = self.messages.is_result
        side, summing = flow[result] - FLOWS.index("query_results"), source[result]
        np.minimum.at(self.begun, (side, target[result] // self.heads, owner[result]), due[result])
        begun = self.begun[side, summing // self.heads, owner[result]]
        np.add.at(self.change, (begun, summing), self.wide[result])
        np.add.at(self.change, (posted[result], summing), -self.wide[result])
        return int(self.change.cumsum(axis=0).max(initial=0))


def _events(
    schedule: Schedule, messages: Messages, begins: Floats, arrival: Floats, tiles: dict[int, tuple[Floats, Floats]]
) -> list[Event]:
    events = []
    for message, start_s, stop_s in zip(messages.one_by_one(), begins.tolist(), arrival.tolist(), strict=True):
        events += [Event(end, message, start_s, stop_s) for end in (message.source, message.target)]
    for plan in schedule.plans():
        for number, step in enumerate(plan.steps):
            if step.tile is not None:
                starts, stops = tiles[number]
                events.append(Event(plan.rank, step.tile, float(starts[plan.rank]), float(stops[plan.rank])))
    return events
