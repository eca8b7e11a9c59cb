"""Messages computed at once equal those of the ranks one by one, and a simulated pass equals one worked by hand."""

from __future__ import annotations

import random
from collections import defaultdict

import numpy as np
import pytest
from helpers.layouts import scattered
from longring.kernels.layout import SeqLayout
from longring.kernels.mask import make_mask
from longring.parallel.cp.choose import Pricer, choose
from longring.parallel.cp.cost import AttentionShape, Event, Speed, play
from longring.parallel.cp.grid import CpGrid, grids
from longring.parallel.cp.layout import zigzag
from longring.parallel.cp.plan import Message, Tile
from longring.parallel.cp.schedules import Schedule
from longring.parallel.cp.simulate import wires_of
from longring.parallel.cp.topology import Fabric, Topology, ethernet, full_mesh, infiniband
from longring.parallel.cp.visible import Pieces, Visibility, pairs_between

SIZES = (1, 2, 3, 4, 6)
SHAPE = AttentionShape(12, 12, 64)
SPEED = Speed(1e12, 8e11, 1e-5)
HALF_DUPLEX = Topology(
    "half duplex", 2, Fabric("mesh", 1e9, 1e-5, full_duplex=False), Fabric("ring", 1e8, 1e-5, full_duplex=False)
)


def layouts_of(size: int, num_tokens: int, starts: tuple[int, ...] = (0,), cut=zigzag) -> list[SeqLayout]:
    return [SeqLayout(cut(num_tokens, rank, size).runs, starts) for rank in range(size)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_messages_of_the_whole_pass_are_those_of_the_ranks(size, direction):
    for number, grid in enumerate(grids(size)):
        starts = (0,) if number % 2 else (0, 37, 40, 101)
        visibility = (Visibility(), Visibility(causal=False), Visibility(window=33))[number % 3]
        cut = (zigzag, scattered)[number % 5 % 2]
        schedule = Schedule(grid, layouts_of(size, 17 * size + 90, starts, cut), visibility, direction)
        sends = [message for plan in schedule.plans() for step in plan.steps for message in step.sends]
        receives = [message for plan in schedule.plans() for step in plan.steps for message in step.receives]
        assert sorted(sends) == sorted(receives) == sorted(schedule.one_by_one(schedule.all_messages))


def played_by_hand(schedule: Schedule, visibility: Visibility, topology: Topology) -> tuple[float, dict]:
    """Simulate a pass message by message and rank by rank: seconds, and bytes by link."""
    grid, plans = schedule.grid, schedule.plans()
    ready = [0.0] * grid.size
    arrival: dict[Message, float] = {}
    free: dict = defaultdict(float)
    carried: dict = defaultdict(int)

    def weight(message: Message) -> int:
        return SHAPE.bytes_of(message, grid, schedule.direction)

    for number in range(max(len(plan.steps) for plan in plans)):
        for half in (0, 1):
            exchanges = [
                (plan.rank, plan.steps[number].exchanges()[half]) for plan in plans if number < len(plan.steps)
            ]
            for rank, exchange in exchanges:
                ready[rank] = max([ready[rank], *(arrival[m] for m in (*exchange.due, *exchange.sent))])
            sends = [message for _, exchange in exchanges for message in exchange.sends]
            paths = {m: topology.path(grid.size, m.source, m.target) for m in sends}
            until: dict = defaultdict(float)
            for m, path in paths.items():
                begin = max([ready[m.source], ready[m.target], *(free[link] for link in path.links)])
                shares = [
                    sum(min(weight(m), weight(o)) for o in sends if link in paths[o].links) for link in path.links
                ]
                through = begin + max(shares) / path.bytes_per_s
                arrival[m] = through + path.latency_s
                for link in path.links:
                    until[link] = max(until[link], through)
                    carried[link] += weight(m)
            free |= until
        for plan in plans:
            tile = plan.steps[number].tile if number < len(plan.steps) else None
            if tile is not None:
                sides = schedule.layouts[tile.query_owner], schedule.layouts[tile.key_owner]
                mask = make_mask(*sides, causal=visibility.causal, window=visibility.window)
                ready[plan.rank] += float(SPEED.seconds(np.array(mask.num_pairs), SHAPE, grid, schedule.direction))
    return max(ready), dict(carried)


@pytest.mark.parametrize("topology", [full_mesh(12), infiniband(12, 2), ethernet(12, 4), HALF_DUPLEX], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_all_ranks_at_once_are_played_as_one_by_one(topology, direction):
    chosen = random.Random(0)
    for size in SIZES:
        found = list(grids(size))
        for grid in chosen.sample(found, min(len(found), 12)):
            starts = chosen.choice([(0,), (0, 61, 500)])
            visibility = chosen.choice([Visibility(), Visibility(causal=False), Visibility(window=100)])
            cut = chosen.choice([zigzag, scattered])
            schedule = Schedule(grid, layouts_of(size, 128 * size + 3, starts, cut), visibility, direction)
            seconds, carried = played_by_hand(schedule, visibility, topology)
            price = play(schedule, topology, SHAPE, SPEED)
            assert price.seconds == pytest.approx(seconds, rel=1e-12), grid
            assert price.bytes_by_link == carried, grid
            every = [m for plan in schedule.plans() for step in plan.steps for m in step.sends]
            assert price.sent_bytes == sum(SHAPE.bytes_of(m, grid, direction) for m in every)


def test_two_ranks_by_arithmetic():
    """A ring of two in the forward: one message, hidden under the own tile, then the other tile."""
    num_tokens, rate, latency = 4096, 64e9, 10e-6
    schedule = Schedule(CpGrid.ring(2), layouts_of(2, num_tokens), Visibility(), "forward")
    price = play(schedule, full_mesh(2), SHAPE, SPEED, record=True)
    rows, own = num_tokens // 2, num_tokens // 4  # the later chunk of rank 0 meets all keys of rank 1's first
    pairs_own = [own * (own + 1) // 2 * 2 + own * own] * 2
    pairs_other = [own * own * 2] * 2
    flops = 4 * 64 * 12 / 1e12
    tiles = [1e-5 + pairs * flops for pairs in (*pairs_own, *pairs_other)]
    keys = {"full": rows * 2 * 12 * 64 * 2, "half": rows * 12 * 64 * 2}  # rank 1 needs only the first chunk of rank 0
    assert sorted(price.bytes_by_link.values()) == sorted(keys.values())
    arrives = keys["full"] / rate + latency
    assert price.seconds == pytest.approx(max(tiles[0], arrives) + tiles[2])
    assert price.compute_s == pytest.approx(tiles[0] + tiles[2])
    computed = [event for event in price.events if isinstance(event.item, Tile)]
    assert sorted(event.rank for event in computed) == [0, 0, 1, 1]
    for event in price.events:
        if isinstance(event.item, Message):
            ends = (event.item.source, event.item.target)
            assert event.rank in ends and event.start_s == 0.0


def test_events_are_recorded_at_both_ends_and_only_when_asked_for():
    schedule = Schedule(CpGrid(heads=2, query=2, kv=2), layouts_of(8, 1024), Visibility(), "backward")
    assert play(schedule, full_mesh(8), SHAPE, SPEED).events == []
    events = play(schedule, full_mesh(8), SHAPE, SPEED, record=True).events
    messages = schedule.one_by_one(schedule.all_messages)
    assert sorted(e.item for e in events if isinstance(e.item, Message)) == sorted(messages * 2)
    by_message: dict[Message, list[Event]] = defaultdict(list)
    for event in events:
        if isinstance(event.item, Message):
            by_message[event.item].append(event)
    for message, (one, other) in by_message.items():
        assert {one.rank, other.rank} == {message.source, message.target}
        assert one[2:] == other[2:]
        assert one.stop_s > one.start_s


def test_wires_say_what_the_topology_says():
    topology = Topology("t", 3, Fabric("mesh", 5e9, 1e-6), Fabric("ring", 1e9, 2e-6))
    wires = wires_of(topology, 7)
    for source in range(7):
        for target in range(7):
            links = [wires.names[link] for link in wires.links[source * 7 + target] if link < len(wires.names)]
            if source == target:
                assert not links
                continue
            path = topology.path(7, source, target)
            assert tuple(links) == path.links
            assert wires.bytes_per_s[source * 7 + target] == path.bytes_per_s
            assert wires.latency_s[source * 7 + target] == path.latency_s


def test_beyond_sixteen_ranks_the_ring_is_priced_too():
    """The ring is priced although it moves many bytes: where a node has one port, it crosses it with one rank only."""
    found = choose(32, Pricer(2**15, SHAPE, ethernet(32), SPEED, passes=("forward",)))
    assert CpGrid.ring(32).kv in {priced.grid.kv for priced in found}


def test_a_thousand_ranks_share_the_pairs_evenly():
    """Zigzag gives each of 1,024 ranks the same number of pairs, together those of the causal mask."""
    size, num_tokens = 1024, 2**20
    pairs = pairs_between(Pieces.of(layouts_of(size, num_tokens)), size, Visibility()).sum(1)
    assert pairs.min() == pairs.max()
    assert int(pairs.sum()) == num_tokens * (num_tokens + 1) // 2
