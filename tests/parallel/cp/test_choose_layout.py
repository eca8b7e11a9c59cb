"""The layout of a packing: its price counts what plans send and compute, and its choice is good by the simulator."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from helpers.lanes import by_lane
from helpers.layouts import scattered
from hypothesis import given, settings
from hypothesis import strategies as st
from longring.kernels.layout import SeqLayout
from longring.parallel.cp import choose_layout, visible
from longring.parallel.cp.choose import Pricer, choose
from longring.parallel.cp.choose_layout import CLEARLY, ROUNDING, LayersOf, LayoutPricer
from longring.parallel.cp.cost import ASSUMED, AttentionShape, Speed, play
from longring.parallel.cp.grid import CpGrid, Layout, Order, Route, grids
from longring.parallel.cp.packed import Runs, divided, typical_packing
from longring.parallel.cp.plan import Pass
from longring.parallel.cp.schedules import Schedule
from longring.parallel.cp.simulate import Tiles, Times, Traffic, least_seconds, simulate, wires_of
from longring.parallel.cp.topology import PRESETS, ethernet, full_mesh, infiniband
from longring.parallel.cp.visible import Visibility

from .test_packed import lognormal

SHAPE = AttentionShape(32, 8, 128)


def simulated(
    grid: CpGrid, shares: list[Runs], starts: tuple[int, ...], pricer: LayoutPricer, window: int | None = None
) -> float:
    """Return the simulated seconds of both passes of a layer."""
    schedule = Schedule(grid, [SeqLayout(runs, starts) for runs in shares], Visibility(window=window), "forward")
    both = schedule, schedule.turned("backward")
    return sum(play(of, pricer.topology, pricer.shape, pricer.speed).seconds for of in both)


@settings(max_examples=25)
@given(st.data())
def test_a_layout_is_priced_as_its_plans_are_simulated(data):
    """The price follows from the documents alone, with messages that carry no gaps, with and without windows.

    It is exact where a share goes directly or its results are summed; else results are also sent for rows that were
    only passed on, and the price counts those that a stop needs.
    """
    query, kv = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    size, exact = query * kv, data.draw(st.booleans())
    of_query, of_kv = (data.draw(st.sampled_from(("round", "direct") if exact else get_args(Route))) for _ in range(2))
    order, in_flight = data.draw(st.sampled_from(get_args(Order))), data.draw(st.integers(1, size))
    grid = CpGrid(query=query, kv=kv, query_route=of_query, kv_route=of_kv, order=order, in_flight=in_flight)
    num_tokens = 2 * size * data.draw(st.integers(4, 20))
    starts = (0, *sorted(data.draw(st.sets(st.integers(1, num_tokens - 1), max_size=12))))
    layers = (LayersOf(grid, None, 3), LayersOf(grid, data.draw(st.integers(1, num_tokens)), 2))
    topology = data.draw(st.sampled_from([full_mesh(size), ethernet(size, 2), infiniband(size, 3)]))
    speed = data.draw(st.sampled_from([Speed(1e30, 1e30), Speed(1e12, 1e12, 1e-6), Speed(1e9, 1e9)]))
    pricer = LayoutPricer(num_tokens, layers, SHAPE, topology, speed)
    shares = [
        divided(layout, num_tokens, starts, size, ranks_per_node=topology.ranks_per_node) for layout in get_args(Layout)
    ]
    shares += [[scattered(num_tokens, rank, size).runs for rank in range(size)]] if exact else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visible, "GAP", 0)
        played = [
            sum(of.num_layers * simulated(grid, runs, starts, pricer, of.window) for of in layers if size > 1)
            for runs in shares
        ]
    assert pricer.seconds(shares, starts).tolist() == pytest.approx(played, rel=1e-9 if exact else 0.1)


@settings(max_examples=50)
@given(st.data())
def test_the_choice_is_the_fastest_of_all_layouts_though_not_all_are_simulated(data):
    """A bound that rules a layout out is no more than its time, on any grid, topology, window and packing."""
    size, mean = data.draw(st.sampled_from([2, 4, 8, 12])), data.draw(st.sampled_from([300, 2000, 8000]))
    grid = data.draw(st.sampled_from([grid for grid in grids(size) if grid.unfit(32, 8) is None]))
    topology = data.draw(st.sampled_from([full_mesh(size), ethernet(size, 2), infiniband(size, 3)]))
    speed = data.draw(st.sampled_from([ASSUMED, Speed(1e30, 1e30), Speed(1e13, 1e13)]))
    starts = lognormal(mean, num_tokens := size * 1024, data.draw(st.integers(0, 10**6)))
    windows = ((None, 3), (data.draw(st.integers(1, num_tokens)), 2))
    pricer = LayoutPricer(num_tokens, tuple(LayersOf(grid, *of) for of in windows), SHAPE, topology, speed)
    per_node = topology.ranks_per_node
    shares = [divided(layout, num_tokens, starts, size, windows, per_node) for layout in get_args(Layout)]

    def bounded(traffic: Traffic, tiles: Tiles, num_ranks: int, num_links: int) -> Times:
        times = simulate(traffic, tiles, num_ranks, num_links)
        least = least_seconds(traffic, tiles, wires_of(topology, size).link_bytes_per_s)
        assert least <= (1 + ROUNDING) * times.ready.max()
        return times

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose_layout, "simulate", bounded)
        seconds = pricer.seconds(shares, starts)
    fastest = int(seconds.argmin())
    assert pricer.choose(starts) == shares[fastest if seconds[fastest] < CLEARLY * seconds[0] else 0]


@pytest.mark.parametrize(
    ("starts", "speed"),
    [((0, 4096, 4200, 4400), Speed(1e10, 1e10)), ((0, 2048, 4096, 5000, 6144), Speed(1e30, 1e30))],
    ids=["tiles of the busiest rank", "bytes of the busiest link"],
)
def test_layouts_that_cannot_win_are_not_simulated(starts, speed, monkeypatch):
    """Unequal work rules layouts out where tiles take longest, and bytes do where one layout sends none."""
    passes: list[Tiles] = []

    def counted(traffic: Traffic, tiles: Tiles, *sizes: int) -> Times:
        passes.append(tiles)
        return simulate(traffic, tiles, *sizes)

    monkeypatch.setattr(choose_layout, "simulate", counted)
    layers = (LayersOf(CpGrid(kv=4, kv_route="direct"), None, 1),)
    LayoutPricer(8192, layers, SHAPE, full_mesh(4), speed).choose(starts)
    assert len(passes) == 2  # forward and backward of one layout


def test_one_document_and_heads_alone_stay_in_zigzag():
    """Where ranks differ in heads only, no layout is better."""
    starts = lognormal(2000, 8 * 8192, 0)
    for grid, of in ((CpGrid.ring(8), (0,)), (CpGrid.ulysses(8), starts)):
        pricer = LayoutPricer(8 * 8192, (LayersOf(grid, None, 4),), SHAPE, full_mesh(8), ASSUMED)
        assert pricer.choose(of) == divided("zigzag", 8 * 8192, of, 8)


@pytest.mark.parametrize("size", by_lane([4, 8, 16, 32], quick=[8]))
@settings(max_examples=20)
@given(st.data())
def test_the_choice_is_never_slower_than_zigzag_by_more_than_two_percent(size, data):
    """On any topology, grid, window and packing."""
    preset, mean = data.draw(st.sampled_from(sorted(PRESETS))), data.draw(st.sampled_from([500, 2000, 8000, 20_000]))
    if preset in ("full_mesh", "pcie_pairs", "nvswitch"):
        size = min(size, 8)
    topology, num_tokens = PRESETS[preset](size), size * 4096
    grid = data.draw(st.sampled_from([grid for grid in grids(size) if grid.unfit(32, 8) is None]))
    window = data.draw(st.sampled_from([None, None, 1024]))
    starts = lognormal(mean, num_tokens, data.draw(st.integers(0, 10**6)))
    pricer = LayoutPricer(num_tokens, (LayersOf(grid, window, 1),), SHAPE, topology, ASSUMED)
    chosen, zigzag = (
        simulated(grid, shares, starts, pricer, window)
        for shares in (pricer.choose(starts), divided("zigzag", num_tokens, starts, size))
    )
    assert chosen <= 1.02 * zigzag


def test_a_grid_priced_for_packings_hides_messages_under_unequal_tiles():
    """Where links allow, balanced work takes at most 1.15 of the mean rank's compute on it."""
    size, num_tokens, topology = 8, 8 * 8192, PRESETS["nvswitch"](8)
    pricer = Pricer(num_tokens, SHAPE, topology, ASSUMED, document_starts=typical_packing(num_tokens, 8192))
    grid = choose(size, pricer)[0].grid
    for seed in range(8):
        starts = lognormal(8000 if seed % 2 else 2000, num_tokens, seed)
        layouts = LayoutPricer(num_tokens, (LayersOf(grid, None, 1),), SHAPE, topology, ASSUMED)
        shares = divided("balanced", num_tokens, starts, size)
        work = Schedule(grid, [SeqLayout(runs, starts) for runs in shares], Visibility(), "forward").pairs.sum()
        passes: tuple[Pass, ...] = ("forward", "backward")
        mean = sum(float(ASSUMED.seconds(work / grid.num_positions, SHAPE, grid, of)) for of in passes)
        assert simulated(grid, shares, starts, layouts) <= 1.15 * mean


def test_documents_within_a_node_hide_messages_across_nodes():
    """Where no document is 4/5 of a node's work, all keys at once take at most 1.15 of the mean rank's compute."""
    size, num_tokens, tried = 32, 32 * 8192, 0
    grid = CpGrid(kv=size, kv_route="direct", in_flight=size - 1)
    pricer = LayoutPricer(num_tokens, (LayersOf(grid, None, 1),), SHAPE, infiniband(size), ASSUMED)
    for seed in range(8):
        starts = lognormal(2000, num_tokens, seed)
        lengths = np.diff((*starts, num_tokens))
        pairs = lengths * (lengths + 1) / 2
        if pairs.max() > 0.8 * pairs.sum() / 4:
            continue
        tried += 1
        passes: tuple[Pass, ...] = ("forward", "backward")
        mean = sum(float(ASSUMED.seconds(pairs.sum() / size, SHAPE, grid, of)) for of in passes)
        assert pricer.seconds([pricer.choose(starts)], starts) <= 1.15 * mean
        assert pricer.seconds([divided("balanced", num_tokens, starts, size)], starts) > 1.2 * mean
    assert tried >= 3


def test_work_decides_on_fast_links_and_rows_on_slow_ones():
    """Two documents on a rank each, and one over both: equal work needs the keys of the other rank."""
    starts, grid = (0, 2048, 4096), CpGrid(kv=2, kv_route="direct")
    for speed, wanted in ((Speed(1e12, 1e12), "balanced"), (Speed(1e30, 1e30), "documents")):
        pricer = LayoutPricer(8192, (LayersOf(grid, None, 1),), SHAPE, full_mesh(2), speed)
        layouts = {layout: divided(layout, 8192, starts, 2) for layout in ("zigzag", "balanced", "documents")}
        assert pricer.choose(starts) == layouts[wanted], pricer.seconds(list(layouts.values()), starts)
