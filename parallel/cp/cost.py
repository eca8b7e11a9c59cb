"""Cost model: simulates all ranks of a schedule on a topology, step by step.

A rank starts a step when its last tile is computed and the messages that are due have arrived. A message starts when
both ends have posted it and its links have carried all that was posted in earlier steps; messages that are posted in
the same step and use the same link share its bandwidth evenly. This approximates gloo and NCCL with one stream a
channel; `benchmarks/cp_lab_network.py` compares it with measured times.
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
from .rows import num_rows
from .schedules import Schedule
from .topology import Topology
from .visible import Ints

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class AttentionShape:
    """Shape of one layer's attention on one tensor-parallel rank; with the tokens it determines FLOPs and bytes."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int = 2
    """Bytes per element of q, k and v."""
    batch: int = 1
    """Sequences per micro-batch."""
    narrow_results: bool = True
    """Whether partial results travel in the dtype of q, k, v (see `CpConfig.narrow_results`)."""

    def bytes_of(self, message: Message, grid: CpGrid, direction: Pass) -> int:
        """Return the size of a message in bytes."""
        row_bytes = int(self.row_bytes(grid, direction)[FLOWS.index(message.flow)])
        return self.batch * num_rows(message.rows) * row_bytes

    def row_bytes(self, grid: CpGrid, direction: Pass) -> Ints:
        """Return the bytes per row of a message, `[flows]` in the order of `FLOWS`."""
        heads = self.num_heads // grid.heads
        kv_heads = max(1, self.num_kv_heads // grid.heads)
        q, kv = heads * self.head_dim, 2 * kv_heads * self.head_dim  # elements per row of q, and of k and v together
        wide = max(self.itemsize, 4)  # lse, delta and sums are fp32 at least

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
    """Speed at which a rank computes tiles."""

    forward_flops: float
    """FLOP/s of the forward, which takes 4 x head_dim FLOPs for each head and visible pair."""
    backward_flops: float
    """FLOP/s of the backward, which takes 10 x head_dim FLOPs for each head and visible pair."""
    tile_s: float = 0.0
    """Fixed time of a tile, in seconds."""

    def seconds(self, pairs: Ints, shape: AttentionShape, grid: CpGrid, direction: Pass) -> Floats:
        """Return the seconds that tiles with these numbers of visible pairs take, like `pairs`."""
        flops, rate = (4, self.forward_flops) if direction == "forward" else (10, self.backward_flops)
        return self.tile_s + shape.batch * pairs * flops * shape.head_dim * (shape.num_heads // grid.heads) / rate


ASSUMED = Speed(forward_flops=500e12, backward_flops=350e12, tile_s=10e-6)
"""Assumed speed of an H100 in bf16, used where nothing was measured: below FlashAttention-3's (arXiv 2407.08608)."""


class Event(NamedTuple):
    """A tile or message of one rank with its time, simulated or measured."""

    rank: int
    item: Tile | Message
    start_s: float
    stop_s: float


@dataclass(frozen=True)
class Price:
    """Simulated cost of one pass."""

    seconds: float
    """Time until the last rank is done."""
    compute_s: float
    """Compute time of the busiest rank."""
    bytes_by_link: dict[Hashable, int]
    """Bytes that each link carries; links are named as in `Topology.path`."""
    sent_bytes: int
    """Bytes that all ranks send; a message counts once, however many links it takes."""
    peak_bytes: int
    """Largest number of bytes that a rank holds at one time of foreign shares, of results for them, of results on
    their way, and of copies of the own share on their way."""
    events: list[Event] = field(repr=False, default_factory=list)

    @property
    def exposed_s(self) -> float:
        """Exposed communication: total time minus the compute time of the busiest rank."""
        return self.seconds - self.compute_s


def play(
    schedule: Schedule,
    topology: Topology,
    shape: AttentionShape,
    speed: Speed,
    *,
    record: bool = False,
) -> Price:
    """Simulate all ranks of a schedule and return the price of the pass.

    With `record` the price has all events: each tile, and each message at both ends.
    """
    grid, size = schedule.grid, schedule.grid.size
    num_steps = int(max(schedule.end, schedule.all_messages.due.max(initial=0) + 1))
    halves = _Halves(schedule.all_messages, num_steps)
    messages = halves.messages
    rows = messages.num_rows * shape.batch
    weights = shape.row_bytes(grid, schedule.direction)[messages.flow] * rows
    wide = replace(shape, narrow_results=False).row_bytes(grid, schedule.direction)[messages.flow] * rows
    wires, pair = wires_of(topology, size), messages.source * size + messages.target
    # [ranks]: time at which a rank can go on, and its compute so far; [links + 1]: time at which a link is free.
    ready, compute_s, free = np.zeros(size), np.zeros(size), np.zeros(len(wires.names) + 1)
    begins, arrival = np.zeros((2, len(pair)))  # seconds, by message
    tiles: dict[int, tuple[Floats, Floats]] = {}  # by step: start and stop, each [ranks]
    holds = _Holds(messages, weights, wide, schedule, num_steps)
    for half in range(2 * num_steps):
        # The order of a step: wait for what is due, post, and in the second half compute the tile.
        came = halves.due(half)
        for end in (messages.source, messages.target) if len(came) else ():
            np.maximum.at(ready, end[came], arrival[came])
        now, step = halves.posted(half), half // 2
        if now.start < now.stop:
            # Both ends must have posted.
            begins[now] = np.maximum(ready[messages.source[now]], ready[messages.target[now]])
            begins[now], arrival[now] = _carry(begins[now], weights[now], pair[now], wires, free)
        if half % 2 and 0 <= step - schedule.first < len(schedule.tile_numbers):
            query, key = schedule.tiles(step, np.arange(grid.num_positions))  # owners, [positions]
            pairs = schedule.pairs[query, key]
            holds.use(step, query, key, pairs > 0)
            # [positions] -> [ranks]: the ranks of a position compute the same tile, each with its heads.
            seconds = np.where(pairs > 0, speed.seconds(pairs, shape, grid, schedule.direction), 0).repeat(grid.heads)
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


class _Halves:
    """Messages by half. A step has two: 2 x step exchanges results, 2 x step + 1 exchanges shares and computes."""

    def __init__(self, messages: Messages, num_steps: int) -> None:
        self.messages = messages.select(np.argsort(2 * messages.posted + ~messages.is_result, kind="stable"))
        """Messages in the order of their posts."""
        posted, due = (2 * at + ~self.messages.is_result for at in (self.messages.posted, self.messages.due))
        self._by_due = np.argsort(due, kind="stable")
        # Half h posts messages [posted_at[h], posted_at[h + 1]) and waits for [due_at[h], due_at[h + 1]) of `_by_due`.
        self._posted_at, self._due_at = (
            np.searchsorted(at, np.arange(2 * num_steps + 1)).tolist() for at in (posted, due[self._by_due])
        )

    def posted(self, half: int) -> slice:
        """Return the range of `messages` that a half posts."""
        return slice(self._posted_at[half], self._posted_at[half + 1])

    def due(self, half: int) -> Ints:
        """Return the indices into `messages` of the messages for which a half waits."""
        return self._by_due[self._due_at[half] : self._due_at[half + 1]]


class Wires(NamedTuple):
    """Paths between every two ranks as arrays; a pair has index source x ranks + target."""

    names: list[Hashable]
    """Name of each link."""
    links: NDArray[np.int32]
    """Links of each pair, `[pairs, most links of a pair]`, as indices into `names`; padded with len(names)."""
    bytes_per_s: Floats
    """Bandwidth of each pair's links, `[pairs]`."""
    latency_s: Floats
    """Latency of each pair's path, `[pairs]`."""


@lru_cache(maxsize=8)
def wires_of(topology: Topology, size: int) -> Wires:
    """Return the paths of `size` ranks. Cached: schedules on one topology share them, and 1,024 ranks have 2^20."""
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
    """Return when the messages of one exchange start and arrive, each `[messages]`, and update `free` (`[links + 1]`).

    `free` is the time at which each link has carried all that was posted so far; its last element stands for no link.
    """
    links = wires.links[pair]  # [messages, links of a message]
    begins = np.maximum(posted, free[links].max(axis=1, initial=0))
    # A link that is shared evenly has carried a message of weight w when it has carried min(w, weight) of every message
    # on it: with the messages in order of weight, the sum of the lighter ones + w x (number of the others).
    flat, heavy = links.ravel(), weights.repeat(links.shape[1])
    order = np.lexsort((heavy, flat))
    first = np.searchsorted(flat[order], flat[order])  # of each sorted entry, the first entry of its link
    sums, total = np.cumsum(heavy[order]), np.bincount(flat, minlength=len(free))[flat[order]]
    lighter = sums - heavy[order] - (sums - heavy[order])[first]
    shared = np.empty(len(flat))
    shared[order] = lighter + heavy[order] * (total - (np.arange(len(flat)) - first))
    shared[flat == len(wires.names)] = 0  # padding
    through = begins + shared.reshape(links.shape).max(axis=1, initial=0) / wires.bytes_per_s[pair]
    np.maximum.at(free, flat, through.repeat(links.shape[1]))
    free[-1] = 0  # padding must not hold up later messages
    return begins, through + wires.latency_s[pair]


class _Holds:
    """Memory that ranks hold for others, by step.

    A foreign share is held from its post to its last use, or until the rank to which it is passed on has it. A result
    is held from its post to its merge, and before its post, in fp32, from the first tile that adds to it. Several
    tensors of the own share are copied into one message, which is held until it has been sent; so are rows of several
    runs, and queries that have been traded for heads, since their rows lie between those of keys and values.
    """

    def __init__(
        self,
        messages: Messages,
        weights: NDArray[np.int64],
        wide: NDArray[np.int64],
        schedule: Schedule,
        num_steps: int,
    ) -> None:
        grid = schedule.grid
        self.messages, self.weights, self.wide, self.heads = messages, weights, wide, grid.heads
        alone = schedule.direction == "forward" and grid.heads == 1  # of queries: one tensor of contiguous rows
        copied = [flow == "keys" or (flow == "queries" and not alone) for flow in FLOWS]
        share = (messages.flow == FLOWS.index("queries")) | (messages.flow == FLOWS.index("keys"))
        in_runs = share & (messages.num_rows < messages.stop - messages.start)
        own = messages.owner == messages.source // grid.heads
        self.packed = (np.array(copied)[messages.flow] & own) | in_runs
        self.change = np.zeros((num_steps + 1, grid.size), np.int64)  # bytes taken less bytes freed, [step, rank]
        self.last = np.zeros((2, grid.num_positions, grid.num_positions), np.int32)
        """Step at which a position last uses an owner's share, `[side, position, owner]`."""
        self.begun = np.full((2, grid.num_positions, grid.num_positions), num_steps, np.int32)
        """Step at which a position begins to sum results for an owner's share, `[side, position, owner]`."""

    def use(self, step: int, query: Ints, key: Ints, used: NDArray[np.bool_]) -> None:
        """Record that positions use shares at a step: owners of queries and keys and `used`, each `[positions]`."""
        positions = np.arange(len(query))[used]
        for side, owner in enumerate((query[used], key[used])):
            self.last[side, positions, owner] = step
            np.minimum.at(self.begun[side], (positions, owner), step)

    def peak_bytes(self) -> int:
        """Return the largest number of bytes that a rank holds at one step."""
        flow, owner, *_, source, target, posted, due = self.messages
        share = (flow == FLOWS.index("queries")) | (flow == FLOWS.index("keys"))
        for end, step in ((target, due), (source, due - 1)):
            np.maximum.at(self.last, (flow[share], end[share] // self.heads, owner[share]), step[share])
        # Messages in their buffers: shares at the target until their last use, results at both ends until they are due.
        until = due.copy()
        until[share] = self.last[flow[share], target[share] // self.heads, owner[share]] + 1
        for end, held in ((target, slice(None)), (source, ~share)):
            np.add.at(self.change, (posted[held], end[held]), self.weights[held])
            np.add.at(self.change, (until[held], end[held]), -self.weights[held])
        np.add.at(self.change, (posted[self.packed], source[self.packed]), self.weights[self.packed])
        np.add.at(self.change, (due[self.packed], source[self.packed]), -self.weights[self.packed])
        # Sums of results, at the source of their message: from the first tile, or the first result to be passed on.
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
    """Return the events of all ranks: each message at both ends, each tile."""
    events = []
    for message, start_s, stop_s in zip(schedule.one_by_one(messages), begins.tolist(), arrival.tolist(), strict=True):
        events += [Event(end, message, start_s, stop_s) for end in (message.source, message.target)]
    for plan in schedule.plans():
        for number, step in enumerate(plan.steps):
            if step.tile is not None:
                starts, stops = tiles[number]
                events.append(Event(plan.rank, step.tile, float(starts[plan.rank]), float(stops[plan.rank])))
    return events
