"""The layout of a packing: its price counts what plans send and compute, and its choice is good by the simulator."""

from __future__ import annotations

import pytest
from helpers.lanes import by_lane
from helpers.layouts import scattered
from hypothesis import given, settings
from hypothesis import strategies as st
from longring.kernels.layout import SeqLayout
from longring.parallel.cp import visible
from longring.parallel.cp.choose import Pricer, choose
from longring.parallel.cp.choose_layout import LayersOf, LayoutPricer
from longring.parallel.cp.cost import ASSUMED, AttentionShape, Speed, play
from longring.parallel.cp.grid import CpGrid
from longring.parallel.cp.packed import Runs, divided, typical_packing
from longring.parallel.cp.plan import Pass
from longring.parallel.cp.schedules import Schedule
from longring.parallel.cp.topology import PRESETS, full_mesh
from longring.parallel.cp.visible import Visibility

from .test_packed import lognormal

SHAPE = AttentionShape(32, 8, 128)


def simulated(grid: CpGrid, shares: list[Runs], starts: tuple[int, ...], pricer: LayoutPricer) -> float:
    """Return the simulated seconds of both passes of a layer."""
    schedule = Schedule(grid, [SeqLayout(runs, starts) for runs in shares], Visibility(), "forward")
    both = schedule, schedule.turned("backward")
    return sum(play(of, pricer.topology, pricer.shape, pricer.speed).seconds for of in both)


@settings(max_examples=40)
@given(st.data())
def test_a_price_counts_the_rows_that_plans_send(data):
    """Where nothing but links takes time and all shares leave at once, it is the busiest link's time by the plans."""
    query, kv = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    size = query * kv
    grid = CpGrid(query=query, kv=kv, query_route="direct", kv_route="direct", in_flight=size)
    num_tokens = 2 * size * data.draw(st.integers(4, 20))
    starts = (0, *sorted(data.draw(st.sets(st.integers(1, num_tokens - 1), max_size=6))))
    shares = [scattered(num_tokens, rank, size).runs for rank in range(size)]
    pricer = LayoutPricer(num_tokens, (LayersOf(grid, None, 3),), SHAPE, full_mesh(size), Speed(1e30, 1e30))
    busiest = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visible, "GAP", 0)
        schedule = Schedule(grid, [SeqLayout(runs, starts) for runs in shares], Visibility(), "forward")
        for of in (schedule, schedule.turned("backward")):
            carried = play(of, pricer.topology, SHAPE, pricer.speed).bytes_by_link.values()
            busiest += max(carried, default=0) / pricer.topology.inside.bytes_per_s
    assert pricer.seconds(shares, starts) == pytest.approx(3 * busiest, rel=1e-9)


def test_one_document_and_heads_alone_stay_in_zigzag():
    """Where ranks differ in heads only, no layout is better."""
    starts = lognormal(2000, 8 * 8192, 0)
    for grid, of in ((CpGrid.ring(8), (0,)), (CpGrid.ulysses(8), starts)):
        pricer = LayoutPricer(8 * 8192, (LayersOf(grid, None, 4),), SHAPE, full_mesh(8), ASSUMED)
        assert pricer.choose(of) == divided("zigzag", 8 * 8192, of, 8)


@pytest.mark.parametrize("preset", by_lane(["nvswitch", "pcie_pairs", "infiniband", "ethernet"], quick=["nvswitch"]))
@pytest.mark.parametrize("mean", by_lane([2000, 8000, 20_000], quick=[2000]))
def test_the_choice_is_never_much_slower_than_zigzag(preset, mean):
    """On the grid that is chosen for one document; where links allow, it is much faster."""
    size = 8 if preset in ("nvswitch", "pcie_pairs") else 16
    topology, num_tokens = PRESETS[preset](size), size * 8192
    grid = choose(size, Pricer(num_tokens, SHAPE, topology, ASSUMED))[0].grid
    for seed in range(4):
        starts = lognormal(mean, num_tokens, seed)
        pricer = LayoutPricer(num_tokens, (LayersOf(grid, None, 1),), SHAPE, topology, ASSUMED)
        chosen, zigzag = (
            simulated(grid, shares, starts, pricer)
            for shares in (pricer.choose(starts), divided("zigzag", num_tokens, starts, size))
        )
        assert chosen <= 1.02 * zigzag, (grid, seed)


def test_a_grid_priced_for_packings_hides_messages_under_unequal_tiles():
    """Where links allow, balanced work takes at most 1.15 of the mean rank's compute on it."""
    size, num_tokens, topology = 8, 8 * 8192, PRESETS["nvswitch"](8)
    pricer = Pricer(num_tokens, SHAPE, topology, ASSUMED, document_starts=typical_packing(num_tokens, 8192))
    grid = choose(size, pricer)[0].grid
    for seed in range(4):
        starts = lognormal(8000, num_tokens, seed)
        layouts = LayoutPricer(num_tokens, (LayersOf(grid, None, 1),), SHAPE, topology, ASSUMED)
        shares = divided("balanced", num_tokens, starts, size)
        work = Schedule(grid, [SeqLayout(runs, starts) for runs in shares], Visibility(), "forward").pairs.sum()
        passes: tuple[Pass, ...] = ("forward", "backward")
        mean = sum(float(ASSUMED.seconds(work / grid.num_positions, SHAPE, grid, of)) for of in passes)
        assert simulated(grid, shares, starts, layouts) <= 1.15 * mean


def test_work_decides_on_fast_links_and_rows_on_slow_ones():
    """Two documents on a rank each, and one over both: equal work needs the keys of the other rank."""
    starts, grid = (0, 2048, 4096), CpGrid(kv=2, kv_route="direct")
    for speed, wanted in ((Speed(1e12, 1e12), "balanced"), (Speed(1e30, 1e30), "documents")):
        pricer = LayoutPricer(8192, (LayersOf(grid, None, 1),), SHAPE, full_mesh(2), speed)
        layouts = {layout: divided(layout, 8192, starts, 2) for layout in ("zigzag", "balanced", "documents")}
        assert pricer.choose(starts) == layouts[wanted], {x: pricer.seconds(layouts[x], starts) for x in layouts}
