"""Prices worked by hand, bytes and memory compared with what `execute` sends and holds, and the choice of a grid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.lanes import by_lane
from helpers.layouts import scattered
from hypothesis import given, settings
from hypothesis import strategies as st
from longring.kernels.layout import SeqLayout
from longring.parallel.cp import choose as choosing
from longring.parallel.cp import execute, visible
from longring.parallel.cp.choose import PricedGrid, Pricer, _best_of_each, choose
from longring.parallel.cp.compiled import Post
from longring.parallel.cp.cost import AttentionShape, Price, Speed, play
from longring.parallel.cp.grid import NAMED, CpGrid, divisions, grids
from longring.parallel.cp.layout import contiguous, zigzag
from longring.parallel.cp.plan import FLOWS, Message, Messages, Pass
from longring.parallel.cp.rows import num_rows
from longring.parallel.cp.schedules import Schedule
from longring.parallel.cp.topology import PRESETS, Fabric, Topology
from longring.parallel.cp.transports import InProcess
from longring.parallel.cp.visible import Visibility

ALL_PAIRS = Visibility(causal=False)
ONE = AttentionShape(num_heads=1, num_kv_heads=1, head_dim=1)
"""Rows have 4 bytes of keys and values, 2 of queries, and 2 + 4 (lse) of results in the forward."""
PAIR_A_SECOND = Speed(forward_flops=4.0, backward_flops=10.0)


def switch(bytes_per_s: float, latency_s: float = 0.5, ends_per_port: int = 1) -> Topology:
    return Topology("", 16, Fabric("switch", bytes_per_s, latency_s, ends_per_port))


def played(grid: CpGrid, topology: Topology, direction: Pass = "forward", speed=PAIR_A_SECOND) -> Price:
    """Return the price with four tokens a rank: every tile has 16 pairs."""
    layouts = [contiguous(4 * grid.size, rank, grid.size) for rank in range(grid.size)]
    schedule = Schedule(grid, layouts, ALL_PAIRS, direction)
    return play(schedule, topology, ONE, speed)


def test_keys_travel_under_the_own_tile():
    found = played(CpGrid.ring(2), switch(4.0))  # 16 bytes take 4.5 s, a tile 16
    assert (found.seconds, found.compute_s, found.exposed_s) == (32.0, 32.0, 0.0)
    assert set(found.bytes_by_link.values()) == {16}
    assert len(found.bytes_by_link) == 4


def test_keys_that_come_late_are_waited_for():
    found = played(CpGrid.ring(2), switch(1.0))  # 16.5 s
    assert (found.seconds, found.exposed_s) == (32.5, 0.5)


def test_fixed_time_of_a_tile_and_backward():
    speed = Speed(4.0, 10.0, tile_s=1.0)
    assert played(CpGrid.ring(2), switch(4.0), speed=speed).seconds == 34.0
    # dK and dV for the other rank's keys are sent when they are complete: 4 rows of 4 bytes.
    assert played(CpGrid.ring(2), switch(16.0), "backward").seconds > 32.0


def test_results_leave_after_their_tile():
    """TokenRing of two: queries are hidden under the own tile; 24 bytes of results follow the second, exposed."""
    found = played(CpGrid.token_ring(2), switch(4.0))
    assert (found.seconds, found.exposed_s) == (32.0 + 24 / 4 + 0.5, 6.5)
    assert set(found.bytes_by_link.values()) == {8 + 24}


def test_ulysses_trades_before_and_after():
    """Two heads, one a rank: 4 rows x (2 + 4) bytes to trade, 64 pairs of one head, 4 rows x 2 bytes to trade back."""
    layouts = [contiguous(8, rank, 2) for rank in range(2)]
    schedule = Schedule(CpGrid.ulysses(2), layouts, ALL_PAIRS, "forward")
    found = play(schedule, switch(4.0), AttentionShape(2, 2, 1), PAIR_A_SECOND)
    assert found.seconds == (24 / 4 + 0.5) + 64 + (8 / 4 + 0.5)


def keys(source: int, target: int, rows: int, posted: int = 0, due: int = 1) -> Message:
    return Message("keys", source, ((0, rows),), source, target, posted, due)


class HandMade(Schedule):
    """A schedule of the given messages, and of tiles of 64 pairs at the given (rank, step)."""

    def __init__(self, size: int, messages: list[Message], tiles: Sequence[tuple[int, int]]) -> None:
        held = [SeqLayout(((0, 8),), (0, 8))] * size
        super().__init__(CpGrid(kv=size), held, ALL_PAIRS, "forward")
        columns = [
            (FLOWS.index(m.flow), m.owner, *m.rows[0], num_rows(m.rows), 0, m.source, m.target, m.posted, m.due)
            for m in messages
        ]
        self._all = Messages(*np.array(columns).T), {}
        # One more share: a rank that is paired with it has no tile.
        self.pairs = np.pad(np.full((size, size), 64), ((0, 0), (0, 1)))
        self.made = set(tiles)

    def tiles(self, step, position):
        step, position = np.broadcast_arrays(step, position)
        has_tile = np.vectorize(lambda *tile: tile in self.made)(position, step)
        return position, np.where(has_tile, position, position.shape[-1])

    def one_by_one(self, messages):
        columns = zip(*(column.tolist() for column in messages), strict=True)
        return [
            Message(FLOWS[flow], owner, ((start, stop),), *rest) for flow, owner, start, stop, _, _, *rest in columns
        ]

    def plans(self):
        return []


def arrivals(topology: Topology, size: int, messages: list[Message], tiles=()) -> list[float]:
    """Return the arrival time of each message; a row of keys takes one second on a link of 4 bytes/s."""
    made = HandMade(size, messages, tiles)
    found = play(made, topology, ONE, PAIR_A_SECOND, record=True)
    stops = {event.item: event.stop_s for event in found.events}
    return [stops[message] for message in messages]


def test_a_shared_port_is_shared_evenly():
    messages = [keys(0, 2, 2), keys(1, 4, 4)]
    assert arrivals(switch(4.0, ends_per_port=1), 6, messages) == [2.5, 4.5]
    # Out of one port: both at half the rate until the shorter one has been carried, then the longer one alone.
    assert arrivals(switch(4.0, ends_per_port=2), 6, messages) == [4.5, 6.5]


def test_a_shared_port_in():
    assert arrivals(switch(4.0), 3, [keys(0, 2, 3), keys(1, 2, 3)]) == [6.5, 6.5]
    both_ways = [keys(0, 1, 3), keys(1, 0, 3)]
    assert arrivals(switch(4.0), 2, both_ways) == [3.5, 3.5]
    half = Topology("", 2, Fabric("switch", 4.0, 0.5, full_duplex=False))
    assert arrivals(half, 2, both_ways) == [6.5, 6.5]


def test_a_chain_of_hops():
    ring = Topology("", 6, Fabric("ring", 4.0, 0.5))
    assert arrivals(ring, 6, [keys(0, 3, 2)]) == [2 + 3 * 0.5]
    # The message over one hop shares the last link of the message over three.
    assert arrivals(ring, 6, [keys(0, 3, 2), keys(2, 3, 2), keys(4, 5, 2)]) == [4 + 1.5, 4.5, 2.5]


def test_a_link_carries_one_step_after_the_other():
    later = [keys(0, 1, 6, 0, 3), keys(0, 1, 2, 1, 3)]
    assert arrivals(switch(4.0), 2, later) == [6.5, 8.5]


def test_a_message_begins_when_both_ends_have_posted():
    assert arrivals(switch(4.0), 2, [keys(0, 1, 2, 1, 2)], [(1, 0)]) == [64 + 2.5]
    assert arrivals(switch(4.0), 2, [keys(0, 1, 2, 1, 2)], [(0, 0)]) == [64 + 2.5]


class Counting(InProcess):
    """Transport that counts the bytes of each message at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes_of: dict[tuple[bool, Message], int] = {}

    def post(self, sends, receives) -> None:
        for is_send, messages in ((True, sends), (False, receives)):
            for message, tensors in messages.items():
                assert all(x.is_contiguous() for x in tensors)
                self.bytes_of[is_send, message] = sum(x.numel() * x.element_size() for x in tensors)
        super().post(sends, receives)


def executed(monkeypatch, spec, shape: AttentionShape, dtype) -> dict[Pass, tuple[Counting, Counter[int]]]:
    """Run both passes of all ranks in this process; return for each its transport and the peak bytes of each rank."""
    size, generator = spec.grid.size, torch.Generator().manual_seed(0)
    held: Counter[int] = Counter()
    stats_of: dict[int, dict[int, int]] = {}  # by rank: bytes of lse and delta of each pack alive, by its address

    def look(run: execute._Run) -> None:
        own = {x.untyped_storage().data_ptr() for xs in run.views[:4] for x in xs}
        alive: dict[int, int] = {}
        stats, before = {}, stats_of.get(run.plan.rank, {})
        posts = [operation for operation in run.plan.operations if isinstance(operation, Post)]
        passed_on = {send.slot for post in posts for send in post.sends if send.rows is not None}
        # Rows that are passed on are a view of their share. Their lse and delta are a copy, while those of the share
        # may be freed before its rows: the price counts them once, as long as the rows.
        for slot, (rows, *of_rows) in sorted(run.packs.items(), key=lambda item: item[0] in passed_on):
            at = rows.untyped_storage().data_ptr()
            alive[at] = rows.untyped_storage().nbytes()
            if slot not in passed_on:
                stats[at] = sum(x.untyped_storage().nbytes() for x in of_rows)
        stats_of[run.plan.rank] = {at: stats.get(at, before.get(at, 0)) for at in alive}
        alive = {at: n + stats_of[run.plan.rank][at] for at, n in alive.items() if at not in own}
        held[run.plan.rank] = max(held[run.plan.rank], sum(alive.values()))

    def looking(compute):
        def compute_and_look(run, operation):
            look(run)
            compute(run, operation)
            look(run)

        return compute_and_look

    for direction in (execute._Forward, execute._Backward):
        monkeypatch.setattr(direction, "compute", looking(direction.compute))
    shapes = [(shape.batch, h) for h in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads, shape.num_heads)]
    inputs = [
        [torch.randn(b, layout.num_tokens, h, shape.head_dim, generator=generator).to(dtype) for b, h in shapes]
        for layout in spec.layouts
    ]
    transport = Counting()
    results = transport.drive(
        [execute.forward(spec, rank, q, k, v, transport) for rank, (q, k, v, _) in enumerate(inputs)]
    )
    found: dict[Pass, tuple[Counting, Counter[int]]] = {"forward": (transport, Counter(held))}
    held.clear()
    transport = Counting()
    transport.drive(
        [
            execute.backward(spec, rank, inputs[rank][3], results[rank][1], shape.num_kv_heads, transport)
            for rank in range(size)
        ]
    )
    monkeypatch.undo()
    found["backward"] = transport, held
    return found


HEADS = [(4, 4), (8, 2), (4, 1)]


@pytest.mark.parametrize("narrow", by_lane([True, False], quick=[True]), ids=["narrow", "wide"])
@pytest.mark.parametrize(
    "dtype", by_lane([torch.bfloat16, torch.float32], quick=[torch.bfloat16]), ids=["bf16", "fp32"]
)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), by_lane(HEADS, quick=[(8, 2)]), ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("base", list(divisions(4)), ids=str)
def test_messages_weigh_what_is_sent(monkeypatch, base, num_heads, num_kv_heads, dtype, narrow):
    shape = AttentionShape(num_heads, num_kv_heads, head_dim=8, itemsize=dtype.itemsize, batch=2, narrow_results=narrow)
    for grid in grids(4):
        if (grid.heads, grid.query, grid.kv) != (base.heads, base.query, base.kv):
            continue
        layouts = tuple(zigzag(37, rank, 4) for rank in range(4))
        spec = execute.AttentionSpec(grid, layouts, Visibility(), narrow_results=narrow)
        for direction, (transport, _) in executed(monkeypatch, spec, shape, dtype).items():
            assert transport.bytes_of
            for (_, message), sent in transport.bytes_of.items():
                assert shape.bytes_of(message, grid, direction) == sent, f"{grid}, {direction}: {message}"


@pytest.mark.parametrize(
    "dtype", by_lane([torch.bfloat16, torch.float32], quick=[torch.bfloat16]), ids=["bf16", "fp32"]
)
@pytest.mark.parametrize("size", by_lane([3, 4, 6], quick=[3], slow=[6]))
def test_the_peak_is_what_was_alive(monkeypatch, size, dtype):
    for grid in grids(size):
        check_peak(monkeypatch, grid, dtype)


def test_queries_between_other_heads_are_copied_for_each_message(monkeypatch):
    """After a trade of heads their rows lie between those of keys and values; here three messages leave at once."""
    check_peak(monkeypatch, CpGrid(2, 4, 1, query_route="direct"), torch.bfloat16)


@pytest.mark.parametrize("grid", [CpGrid(query=4), CpGrid(kv=4, kv_route="both_ways"), CpGrid.ring(4)], ids=str)
def test_rows_of_several_runs_are_alive_no_longer_than_priced(monkeypatch, grid):
    monkeypatch.setattr(visible, "GAP", 0)
    check_peak(monkeypatch, grid, torch.bfloat16, scattered)


def check_peak(monkeypatch, grid: CpGrid, dtype: torch.dtype, cut=zigzag) -> None:
    """Check that the priced peak is what was alive; of trades of heads it counts the messages."""
    size, shape = grid.size, AttentionShape(2 * grid.heads, grid.heads, head_dim=8, itemsize=dtype.itemsize)
    layouts = tuple(cut(12 * size, rank, size) for rank in range(size))
    spec = execute.AttentionSpec(grid, layouts, Visibility())
    for direction, (transport, held) in executed(monkeypatch, spec, shape, dtype).items():
        found = play(spec.schedule(direction), switch(1e9), shape, PAIR_A_SECOND)
        traded: Counter[tuple[str, int]] = Counter()
        for (is_send, message), sent in transport.bytes_of.items():
            if message.is_trade:
                traded[message.flow, message.source if is_send else message.target] += sent
        alive = max([*held.values(), *traded.values()])
        # Rows of several runs are priced as a copy until they have been sent, also where all of a share is passed on.
        assert found.peak_bytes == alive or (cut is scattered and found.peak_bytes > alive), f"{grid}, {direction}"


SPEED = Speed(forward_flops=1e12, backward_flops=2e12, tile_s=1e-6)
FABRICS = {
    "switch": Topology("", 8, Fabric("switch", 1e9, 1e-6)),
    "half": Topology("", 8, Fabric("switch", 1e9, 1e-6, full_duplex=False)),
    "pairs": Topology("", 8, Fabric("switch", 1e9, 1e-6, ends_per_port=2)),
    "mesh": Topology("", 8, Fabric("mesh", 1e9, 1e-6)),
    "ring": Topology("", 8, Fabric("ring", 1e9, 1e-6)),
    "nodes": Topology("", 2, Fabric("switch", 1e10, 1e-6), Fabric("switch", 1e9, 1e-5, ends_per_port=2)),
}
"""Every fabric but `nodes` has one bandwidth for all links."""
attention_shapes = st.builds(
    lambda kv, groups, dim, itemsize: AttentionShape(kv * groups, kv, dim, itemsize),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([16, 128]),
    st.sampled_from([2, 4]),
)


@settings(max_examples=60)
@given(data=st.data(), shape=attention_shapes, size=st.integers(1, 8), fabric=st.sampled_from(sorted(FABRICS)))
def test_a_price_is_no_less_than_compute_or_the_busiest_link(data, shape, size, fabric):
    fit = [grid for grid in grids(size) if grid.unfit(shape.num_heads, shape.num_kv_heads) is None]
    grid, topology = data.draw(st.sampled_from(fit)), FABRICS[fabric]
    found = Pricer(data.draw(st.integers(2 * size, 4000)), shape, topology, SPEED).price(grid)
    for one in (found.passes["forward"], found.passes["backward"]):
        assert one.seconds >= one.compute_s > 0
        rates = dict.fromkeys(one.bytes_by_link, topology.inside.bytes_per_s)
        if topology.across is not None:
            across = [link for link in rates if isinstance(link, tuple) and link[0] == "across"]
            rates |= dict.fromkeys(across, topology.across.bytes_per_s)
        for link, carried in one.bytes_by_link.items():
            assert one.seconds >= carried / rates[link] * (1 - 1e-9)
        assert one.exposed_s >= 0
        assert (one.peak_bytes == 0) == (size == 1)
    assert found.seconds == found.passes["forward"].seconds + found.passes["backward"].seconds
    assert found.peak_bytes == max(found.passes["forward"].peak_bytes, found.passes["backward"].peak_bytes)


def test_all_bytes_are_on_links():
    """A message takes one link on a mesh and two on a switch: the links carry exactly the bytes that are sent."""
    shape, grid = AttentionShape(4, 2, 16), CpGrid.square(6)
    layouts = [zigzag(600, rank, 6) for rank in range(6)]
    for direction in ("forward", "backward"):
        schedule = Schedule(grid, layouts, Visibility(), direction)
        sent = sum(shape.bytes_of(m, grid, direction) for plan in schedule.plans() for s in plan.steps for m in s.sends)
        for fabric, links in (("mesh", 1), ("switch", 2)):
            found = play(schedule, FABRICS[fabric], shape, SPEED)
            assert sum(found.bytes_by_link.values()) == links * sent


def test_windows_and_documents_cost_less():
    shape = AttentionShape(4, 4, 16)
    whole = Pricer(4096, shape, FABRICS["switch"], SPEED).price(CpGrid.ring(4))
    window = Pricer(4096, shape, FABRICS["switch"], SPEED, Visibility(window=64)).price(CpGrid.ring(4))
    assert window.seconds < whole.seconds
    assert window.passes["forward"].compute_s < whole.passes["forward"].compute_s / 4


@pytest.mark.full
@settings(max_examples=40)
@given(
    shape=attention_shapes,
    size=st.integers(1, 8),
    num_tokens=st.integers(16, 100_000),
    fabric=st.sampled_from(sorted(FABRICS)),
)
def test_the_best_fits_and_is_no_dearer_than_any_that_is_named(shape, size, num_tokens, fabric):
    topology = FABRICS[fabric]
    found = choose(size, Pricer(num_tokens, shape, topology, SPEED))
    assert [x.grid for x in found] == [x.grid for x in choose(size, Pricer(num_tokens, shape, topology, SPEED))]
    shapes = [(x.grid.heads, x.grid.query, x.grid.kv) for x in found]
    wanted = [x for x in divisions(size) if x.unfit(shape.num_heads, shape.num_kv_heads) is None]
    assert sorted(shapes) == sorted((x.heads, x.query, x.kv) for x in wanted), "one of every division that fits"
    assert all(a.seconds <= b.seconds for a, b in pairwise(found[1:]))
    named = [make(size) for make in NAMED.values()] + ([CpGrid.hybrid(2, size // 2)] if size % 2 == 0 else [])
    for grid in named:
        assert grid.size == size
        if grid.unfit(shape.num_heads, shape.num_kv_heads) is None:
            assert found[0].seconds <= 1.01 * Pricer(num_tokens, shape, topology, SPEED).price(grid).seconds, grid


def test_of_close_prices_the_least_memory_is_taken():
    """With free links all variants of a division take the same time."""
    free = Topology("", 8, Fabric("switch", 1e30, 0.0))
    found = choose(4, Pricer(4000, AttentionShape(1, 1, 16), free, SPEED))
    every = [Pricer(4000, AttentionShape(1, 1, 16), free, SPEED).price(grid) for grid in grids(4) if grid.heads == 1]
    fastest = min(x.seconds for x in every)
    assert found[0].seconds <= 1.01 * fastest
    assert found[0].peak_bytes == min(x.peak_bytes for x in every if x.seconds <= 1.01 * fastest)


def test_close_is_close_to_the_fastest_of_all():
    """Close means within 1% of the fastest: 101 is close to 100, and 102 is close to 101 but not to 100."""

    def priced(grid: CpGrid, seconds: float, peak_bytes: int) -> PricedGrid:
        half = Price(seconds / 2, seconds / 2, {}, 0, peak_bytes)
        return PricedGrid(grid, {"forward": half, "backward": half})

    a = priced(CpGrid.ring(4), 100.0, 3)
    b = priced(CpGrid.ring_both_ways(4), 101.0, 2)
    c = priced(CpGrid.token_ring(4), 102.0, 1)
    assert _best_of_each([a, b, c]) == [b, c]
    assert _best_of_each([c, a]) == [a, c]


def test_a_topology_that_does_not_reach_is_refused():
    with pytest.raises(ValueError, match="'nvswitch': has 8 ranks"):
        choose(16, Pricer(1000, AttentionShape(8, 8, 16), PRESETS["nvswitch"](8), SPEED))


@pytest.mark.parametrize("size", [12, 24])
def test_many_ranks_are_priced_by_the_few_divisions_that_move_least(monkeypatch, size):
    """More than LARGE = 4 ranks are many here; beyond 4 x LARGE only the simplest routes are priced."""
    monkeypatch.setattr(choosing, "LARGE", 4)
    shape, topology = AttentionShape(8, 8, 16), PRESETS["infiniband"](size)
    found = choose(size, Pricer(64 * size, shape, topology, SPEED))
    divided = {(x.grid.heads, x.grid.query, x.grid.kv) for x in found}
    assert 6 <= len(divided) == len(found) < len(list(divisions(size)))
    assert all((h, 8 // h, size // 8) in divided for h in (1, 2, 4, 8) if size % 8 == 0), "divisions that fill a node"
    ring = Pricer(64 * size, shape, topology, SPEED).price(CpGrid.ring(size))
    assert found[0].seconds <= 1.01 * ring.seconds
    simple = {("direct", "direct"), ("round_and_home", "round"), ("both_ways", "both_ways")}
    assert size == 12 or all((x.grid.query_route, x.grid.kv_route) in simple for x in found)
