"""Cost model: the time, the bytes and the memory of a schedule whose ranks are simulated on a topology."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .grid import CpGrid
from .plan import FLOWS, Message, Messages, Pass, Tile
from .rows import num_rows
from .schedules import Schedule
from .simulate import Floats, Tiles, Times, simulate, wires_of
from .topology import Topology
from .visible import Ints


@dataclass(frozen=True)
class AttentionShape:
    """Shape of one layer's attention on one tensor-parallel rank; with the tokens it determines FLOPs and bytes.

    Raises ValueError unless all numbers are at least 1 and that of query heads is a multiple of that of kv heads.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int = 2
    """Bytes per element of q, k and v."""
    batch: int = 1
    """Sequences per micro-batch."""
    narrow_results: bool = True
    """Whether partial results travel in the dtype of q, k, v (see `CpConfig.narrow_results`)."""

    def __post_init__(self) -> None:
        if min(self.num_heads, self.num_kv_heads) < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads = {self.num_heads}, num_kv_heads = {self.num_kv_heads}: num_heads must be a positive "
                "multiple of num_kv_heads; give the numbers of one tensor-parallel rank"
            )
        if min(self.head_dim, self.itemsize, self.batch) < 1:
            raise ValueError(
                f"head_dim = {self.head_dim}, itemsize = {self.itemsize}, batch = {self.batch}: each must be at least "
                "1; give those of q, k and v"
            )

    def bytes_of(self, message: Message, grid: CpGrid, direction: Pass) -> int:
        """Return the size of a message in bytes."""
        row_bytes = int(self.row_bytes(grid, direction)[FLOWS.index(message.flow)])
        return self.batch * num_rows(message.rows) * row_bytes

    def row_bytes(self, grid: CpGrid, direction: Pass) -> Ints:
        """Return the bytes per row of a message, `[flows]` in the order of `FLOWS`; 0: the pass has none."""
        heads = self.num_heads // grid.heads
        kv_heads = max(1, self.num_kv_heads // grid.heads)  # fewer kv heads than ranks: each rank has one
        q, kv = heads * self.head_dim, 2 * kv_heads * self.head_dim  # elements per row of q, and of k and v together
        wide = max(self.itemsize, 4)  # lse, delta and sums are fp32 at least

        def partial_itemsize(route: str) -> int:
            return self.itemsize if self.narrow_results and route != "round" else wide  # sums on their way stay wide

        # The contents are those of `Flow`; lse and delta are one number for each row and head.
        of_flow = {
            "queries": q * self.itemsize if direction == "forward" else 2 * q * self.itemsize + 2 * heads * wide,
            "keys": kv * self.itemsize,
            "query_results": q * partial_itemsize(grid.query_route) + (heads * wide if direction == "forward" else 0),
            "key_results": 0 if direction == "forward" else kv * partial_itemsize(grid.kv_route),
            "to_heads": (q + kv if direction == "forward" else q) * self.itemsize,
            "from_heads": (q if direction == "forward" else q + kv) * self.itemsize,
        }
        return np.array([of_flow[flow] for flow in FLOWS])


@dataclass(frozen=True)
class Speed:
    """Speed at which a rank computes tiles. Raises ValueError unless both rates are above 0 and the time at least 0."""

    forward_flops: float
    """FLOP/s of the forward, which takes 4 x head_dim FLOPs for each head and visible pair."""
    backward_flops: float
    """FLOP/s of the backward, which takes 10 x head_dim FLOPs for each head and visible pair."""
    tile_s: float = 0.0
    """Fixed time of a tile, in seconds."""

    def __post_init__(self) -> None:
        if not (self.forward_flops > 0 and self.backward_flops > 0 and self.tile_s >= 0):
            raise ValueError(
                f"speed: forward_flops = {self.forward_flops}, backward_flops = {self.backward_flops}, tile_s = "
                f"{self.tile_s}: must be above 0, above 0 and at least 0; take those of `probe`, or leave the speed out"
            )

    def seconds(self, pairs: Ints, shape: AttentionShape, grid: CpGrid, direction: Pass) -> Floats:
        """Return the seconds that tiles with these numbers of visible pairs take, like `pairs`."""
        flops, rate = (4, self.forward_flops) if direction == "forward" else (10, self.backward_flops)
        return self.tile_s + shape.batch * pairs * flops * shape.head_dim * (shape.num_heads // grid.heads) / rate


ASSUMED = Speed(forward_flops=500e12, backward_flops=350e12, tile_s=10e-6)
"""Assumed speed of the fastest attention kernels of an H100 in bf16, below FlashAttention-3's (arXiv 2407.08608);
`speeds.speed_of` has those that were measured, and other kernels'."""


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
    grid, found = schedule.grid, schedule.all_messages
    messages = found.select(np.argsort(found.posted_half, kind="stable"))  # `simulate` takes posts in order
    rows = messages.num_rows * shape.batch
    weights = shape.row_bytes(grid, schedule.direction)[messages.flow] * rows  # bytes, [messages]
    # Bytes of the same messages with results in fp32, as they are summed.
    wide = replace(shape, narrow_results=False).row_bytes(grid, schedule.direction)[messages.flow] * rows
    wires = wires_of(topology, grid.size)
    ends = messages.source, messages.target
    traffic = wires.traffic(*ends, messages.posted_half, messages.due_half, weights.astype(float))
    # [steps, positions]: owners of the queries and of the keys of each tile.
    numbers = np.arange(schedule.first, schedule.first + len(schedule.tile_numbers))
    query, key = schedule.tiles(numbers[:, None], np.arange(grid.num_positions))
    pairs = schedule.pairs[query, key]
    at, position = np.nonzero(pairs)  # of the tiles that see anything, by step: [tiles]
    seconds = speed.seconds(pairs[at, position], shape, grid, schedule.direction)
    # The ranks of a position compute the same tile, each with its heads.
    rank = (position[:, None] * grid.heads + np.arange(grid.heads)).ravel()
    tiles = Tiles((2 * numbers[at] + 1).repeat(grid.heads), rank, seconds.repeat(grid.heads))
    times = simulate(traffic, tiles, grid.size, len(wires.names))
    # Heads are traded back after the last results have come.
    num_steps = int(max(schedule.end, messages.due.max(initial=0) + 1))
    holds = _Holds(messages, weights, wide, schedule, num_steps)
    holds.use(numbers[at], position, query[at, position], key[at, position])
    # [links + 1]: the last number is that of the padding of `links`, which has no name below.
    on_link = np.bincount(traffic.links.ravel(), weights.repeat(traffic.links.shape[1]), len(wires.names) + 1)
    return Price(
        float(times.ready.max()),
        float(np.bincount(tiles.rank, tiles.seconds, grid.size).max()),
        {name: int(carried) for name, carried in zip(wires.names, on_link, strict=False) if carried},
        int(weights.sum()),
        holds.peak_bytes(),
        _events(schedule, messages, tiles, times) if record else [],
    )


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
        in_runs = share & (messages.num_rows < messages.stop - messages.start)  # rows in between are left out
        own = messages.owner == messages.source // grid.heads
        self.packed = (np.array(copied)[messages.flow] & own) | in_runs  # content is a copy, [messages]
        self.change = np.zeros((num_steps + 1, grid.size), np.int64)  # bytes taken less bytes freed, [step, rank]
        self.last = np.zeros((2, grid.num_positions, grid.num_positions), np.int32)
        """Step at which a position last uses an owner's share, `[side, position, owner]`."""
        self.begun = np.full((2, grid.num_positions, grid.num_positions), num_steps, np.int32)
        """Step at which a position begins to sum results for an owner's share, `[side, position, owner]`."""

    def use(self, step: Ints, position: Ints, query: Ints, key: Ints) -> None:
        """Record the tiles of all positions, `[tiles]` in the order of their steps: owners of queries and of keys."""
        for side, owner in enumerate((query, key)):
            self.last[side, position, owner] = step  # steps ascend, and numpy keeps the last of several
            np.minimum.at(self.begun[side], (position, owner), step)

    def peak_bytes(self) -> int:
        """Return the largest number of bytes that a rank holds at one step."""
        flow, owner, *_, source, target, posted, due = self.messages
        share = (flow == FLOWS.index("queries")) | (flow == FLOWS.index("keys"))
        # A share stays at its target at least until it has come, and at a rank that passes it on until that message is
        # waited for. Flows 0 and 1 are the numbers of the sides.
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
        side, summing = flow[result] - FLOWS.index("query_results"), source[result]  # flows 2 and 3 are sides 0 and 1
        np.minimum.at(self.begun, (side, target[result] // self.heads, owner[result]), due[result])
        begun = self.begun[side, summing // self.heads, owner[result]]
        np.add.at(self.change, (begun, summing), self.wide[result])
        np.add.at(self.change, (posted[result], summing), -self.wide[result])
        return int(self.change.cumsum(axis=0).max(initial=0))  # [step, rank]


def _events(schedule: Schedule, messages: Messages, tiles: Tiles, times: Times) -> list[Event]:
    """Return the events of all ranks: each message at both ends, each tile."""
    events = []
    columns = times.posted.tolist(), times.arrival.tolist()
    for message, start_s, stop_s in zip(schedule.one_by_one(messages), *columns, strict=True):
        events += [Event(end, message, start_s, stop_s) for end in (message.source, message.target)]
    columns = (tiles.half // 2, tiles.rank, times.computed - tiles.seconds, times.computed)  # half 2 x step + 1 -> step
    spans = {(step, rank): span for step, rank, *span in zip(*(column.tolist() for column in columns), strict=True)}
    for plan in schedule.plans():
        for number, step in enumerate(plan.steps):
            if step.tile is not None:
                events.append(Event(plan.rank, step.tile, *spans[number, plan.rank]))
    return events
