"""Pictures show every event, and a recorded pass has every message and tile of its plan."""

from __future__ import annotations

import time
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.lanes import by_lane
from longring.parallel.cp.cost import AttentionShape, Event, Speed, play
from longring.parallel.cp.execute import AttentionSpec, backward, forward
from longring.parallel.cp.grid import CpGrid
from longring.parallel.cp.group import open_group
from longring.parallel.cp.layout import zigzag
from longring.parallel.cp.plan import Message, Pass, Tile
from longring.parallel.cp.record import Recorded
from longring.parallel.cp.schedules import Schedule
from longring.parallel.cp.timeline import Panel, _draw_panel, draw, shown_ranks
from longring.parallel.cp.topology import full_mesh
from longring.parallel.cp.transports import Distributed
from longring.parallel.cp.visible import Visibility
from matplotlib.figure import Figure
from matplotlib.path import Path

GRIDS = ["query=4", "kv=4, kv_route=both_ways", "heads=2, query=2, query_route=direct", "query=2, kv=2, order=columns"]
NUM_TOKENS = 203


def recorded(text: str) -> dict[str, tuple[list[Event], float]]:
    """Record both passes of this rank; return the events and the largest difference from passes without recording."""
    torch.manual_seed(0)
    grid = CpGrid.parse(text)
    group = open_group(range(4), [grid])
    layouts = tuple(zigzag(NUM_TOKENS, rank, 4) for rank in range(4))
    spec = AttentionSpec(grid, layouts, Visibility())
    q, k, v, dout = (torch.randn(1, layouts[group.rank].num_tokens, 4, 16) for _ in range(4))
    plain = Distributed(group)
    out, saved = plain.drive(forward(spec, group.rank, q, k, v, plain))
    plain = Distributed(group)
    grads = plain.drive(backward(spec, group.rank, dout, saved, 4, plain))
    found = {}
    passes: tuple[tuple[Pass, Any], ...] = (("forward", (out,)), ("backward", grads))
    for direction, results in passes:
        dist.barrier()
        transport = Recorded(group, spec.compiled(direction, group.rank), origin_s=time.perf_counter())
        if direction == "forward":
            again = (transport.drive(forward(spec, group.rank, q, k, v, transport))[0],)
        else:
            again = transport.drive(backward(spec, group.rank, dout, saved, 4, transport))
        apart = max(float((x - y).abs().max()) for x, y in zip(results, again, strict=True))
        found[direction] = (transport.events, apart)
    return found


@pytest.mark.parametrize("text", by_lane(GRIDS, quick=GRIDS[-1:]))
def test_a_recorded_pass_has_all_of_its_plan_and_the_same_results(on_ranks, text):
    schedules = {
        direction: Schedule(
            CpGrid.parse(text), [zigzag(NUM_TOKENS, rank, 4) for rank in range(4)], Visibility(), direction
        )
        for direction in ("forward", "backward")
    }
    for rank, of_rank in enumerate(on_ranks(4, recorded, text)):
        for direction, (events, apart) in of_rank.items():
            assert apart == 0.0
            steps = schedules[direction].plan(rank).steps
            wanted = [m for step in steps for m in (*step.sends, *step.receives)]
            assert Counter(e.item for e in events if isinstance(e.item, Message)) == Counter(wanted)
            tiles = [event for event in events if isinstance(event.item, Tile)]
            assert [event.item for event in tiles] == [step.tile for step in steps if step.tile is not None]
            assert all(event.rank == rank and 0 <= event.start_s < event.stop_s for event in events)
            for one, after in pairwise(tiles):
                assert one.stop_s <= after.start_s
            # The shares of a tile have arrived before it starts.
            came = {(m.flow, m.owner): e.stop_s for e in events if (m := e.item) in wanted and m.target == rank}
            position = rank // schedules[direction].grid.heads
            for event in tiles:
                for flow, owner in (("queries", event.item.query_owner), ("keys", event.item.key_owner)):
                    assert owner == position or came[flow, owner] <= event.start_s


def panel_of(grid: CpGrid) -> Panel:
    schedule = Schedule(grid, [zigzag(4096, rank, grid.size) for rank in range(grid.size)], Visibility(), "backward")
    price = play(schedule, full_mesh(grid.size), AttentionShape(8, 8, 64), Speed(1e12, 1e12, 1e-5), record=True)
    panel = Panel(grid, "backward", "simulated", price.events)
    assert panel.total_s == pytest.approx(price.seconds)
    assert panel.exposed_s == pytest.approx(price.exposed_s)
    return panel


def corners(path: Path) -> np.ndarray:
    """Return the vertices of a drawn bar, [corner, xy]."""
    return np.asarray(path.vertices)


@pytest.mark.parametrize("grid", [CpGrid.token_ring(4), CpGrid(heads=2, query=2, kv=4), CpGrid.ring(32)], ids=str)
def test_every_event_of_a_shown_rank_is_drawn_once(grid):
    panel, ranks = panel_of(grid), shown_ranks(grid.size, 8)
    axes = Figure().subplots()
    _draw_panel(panel, ranks, axes)
    drawn = sum(len(bars.get_paths()) for bars in axes.collections)
    assert drawn == sum(event.rank in ranks for event in panel.events)
    feet = [corners(path)[:, 1].min() % 1 for bars in axes.collections for path in bars.get_paths()]
    lanes = Counter("receive" if foot < 0.32 else "send" if foot < 0.63 else "tile" for foot in feet)
    assert lanes == Counter(
        "tile" if isinstance(e.item, Tile) else "send" if e.item.source == e.rank else "receive"
        for e in panel.events
        if e.rank in ranks
    )
    last = max((event for event in panel.events if event.rank in ranks), key=lambda event: event.stop_s)
    right = max(corners(path)[:, 0].max() for bars in axes.collections for path in bars.get_paths())
    assert right == pytest.approx(last.stop_s * 1e3)
    for word in (str(grid), "backward", "simulated", f"total {panel.total_s * 1e3:.4g} ms", "exposed"):
        assert word in axes.get_title()


def test_a_picture_of_many_ranks_shows_three_nodes():
    assert shown_ranks(16, 8) == list(range(16))
    assert shown_ranks(64, 8) == [*range(8), *range(32, 40), *range(56, 64)]
    assert shown_ranks(20, 8) == [*range(16), *range(16, 20)]
    assert len(shown_ranks(1024, 1024)) == 24


def test_a_picture_is_written_with_panels_side_by_side(tmp_path):
    panel = panel_of(CpGrid(query=2, kv=2))
    draw([[panel, panel], [panel, panel]], tmp_path / "both.png", ranks_per_node=8)
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
