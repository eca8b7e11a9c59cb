"""`longring plan`: the grid of every bucket and its price, printed, and on request drawn or measured.

Grids are chosen as for a run, but without starting ranks. To measure, `longring plan` starts this module as the ranks
of one context-parallel group.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from ...parallel.cp.choose import PricedGrid, Pricer, choose
from ...parallel.cp.cost import AttentionShape, Event, Speed, play
from ...parallel.cp.execute import AttentionSpec, backward, forward
from ...parallel.cp.grid import CpGrid
from ...parallel.cp.group import (
    CommunicatorOptions,
    all_links,
    channels_of,
    link_bytes,
    links_of,
    open_group,
    slot_layout,
)
from ...parallel.cp.layout import zigzag
from ...parallel.cp.plan import Link, Pass, Tile
from ...parallel.cp.record import Recorded
from ...parallel.cp.schedules import Schedule
from ...parallel.cp.timeline import Panel, draw
from ...parallel.cp.topology import PRESETS, Topology
from ...parallel.cp.visible import Visibility
from ...parallel.mesh import Mesh, join
from ..config import Recipe, load_recipe
from ..fit.links import preset_of
from ..grids.choice import GridChoice, attention_shape, check_named_grids, choose_grids, pricer
from ..grids.measure import named_topology
from ..grids.table import grid_json, grids_table
from ..ranks.clock import Clock
from ..ranks.rank import as_rank
from ..ranks.start import start_ranks

WARM_UP_PASSES = 2
"""Number of passes before the recorded one; they open connections and compile kernels."""


def _preset(recipe: Recipe, world_size: int, named: str | None) -> tuple[str, str]:
    """Return `preset_of`, with a note in the origin if a run would measure its links instead."""
    preset, origin = preset_of(recipe, world_size, named)
    if named is None and recipe.parallel.cp.topology == "probe":
        origin = "assumed; a run probes and may choose other grids"
    return preset, origin


def plan(
    recipe: Recipe,
    console: Console,
    *,
    num_ranks: int | None = None,
    preset: str | None = None,
    timeline: Path | None = None,
) -> tuple[GridChoice, str] | None:
    """Print the grid of every layer kind, and draw the last layer kind of the largest bucket into `timeline`.

    Returns that choice and the name of the topology preset, or None if every bucket fits one rank. Raises ValueError
    for settings that a run would refuse, and if there is nothing to draw.
    """
    if num_ranks is not None:
        recipe.accumulation_steps(num_ranks)
    # By default the fewest ranks that hold the longest bucket.
    world_size = num_ranks or recipe.max_context_parallel * recipe.parallel.tensor
    check_named_grids(recipe)
    preset, origin = _preset(recipe, world_size, preset)
    (topology, speed), shape = named_topology(preset, recipe, world_size), attention_shape(recipe)
    console.print(
        f"{world_size:,} ranks, {recipe.parallel.tokens_per_rank:,} tokens on each\n"
        f"topology: {topology.name} ({origin})\n"
        f"one layer on one rank: {shape.num_heads} query heads and {shape.num_kv_heads} kv heads of {shape.head_dim}, "
        f"{shape.itemsize} bytes a number\n"
        f"assumed speed: {speed.forward_flops / 1e12:.0f} TFLOP/s forward, {speed.backward_flops / 1e12:.0f} "
        f"backward, {speed.tile_s * 1e6:.0f} us a tile",
        highlight=False,
        soft_wrap=True,
    )
    if recipe.max_context_parallel == 1:
        if timeline is not None:
            raise ValueError(
                f"--timeline {timeline}: nothing to draw, since the longest bucket in use, {max(recipe.lengths)} "
                f"tokens, fits one rank; lower parallel.tokens_per_rank = "
                f"{recipe.parallel.tokens_per_rank}"
            )
        console.print("every bucket fits one rank, so attention needs no grid")
        return None
    with console.status("pricing grids"):
        choices = choose_grids(recipe, recipe.lengths, topology, speed)
        # A grid that the recipe names is shown beside those that "auto" would choose from.
        choices = [choice._replace(others=_alternatives(recipe, choice, topology, speed)) for choice in choices]
    console.print(grids_table(choices))
    console.print(transport_lines(recipe, [choice.grid for choice in choices], topology), highlight=False)
    if timeline is not None:
        last = choices[-1]
        asked = pricer(recipe, last.kind, topology, speed)
        draw([[panel] for panel in simulate_passes(asked, last.grid)], timeline, ranks_per_node=topology.ranks_per_node)
        console.print(f"drawn: {timeline}", soft_wrap=True)
    return choices[-1], preset


def plan_json(recipe: Recipe, *, num_ranks: int | None = None, preset: str | None = None) -> dict[str, Any]:
    """Return the grid of every layer kind and all that were priced, as JSON. Raises ValueError as `plan` does."""
    if num_ranks is not None:
        recipe.accumulation_steps(num_ranks)
    world_size = num_ranks or recipe.max_context_parallel * recipe.parallel.tensor
    check_named_grids(recipe)
    name, origin = _preset(recipe, world_size, preset)
    topology, speed = named_topology(name, recipe, world_size)
    choices = choose_grids(recipe, recipe.lengths, topology, speed)
    return {
        "ranks": world_size,
        "tokens_per_rank": recipe.parallel.tokens_per_rank,
        "topology": {"preset": name, "origin": origin, **asdict(topology)},
        "speed": asdict(speed),
        "grids": [grid_json(choice) for choice in choices],
    }


def transport_lines(recipe: Recipe, grids: Sequence[CpGrid], topology: Topology) -> str:
    """Return the communicators and the copies by which the messages of grids travel, with their memory."""
    settings, largest = recipe.parallel.cp, max(grid.size for grid in grids)
    copied = settings.peer_copies == "always" or (settings.peer_copies == "auto" and recipe.parallel.gpu_queues > 1)
    inside = [grid for grid in set(grids) if copied and grid.size <= topology.ranks_per_node]
    wired = set(grids) - set(inside)
    lines = [f"1 communicator over {largest:,} ranks, for sums"]
    if wired:
        # Rank 0 stands for every rank; the first channel serves sums, even of rings that copy.
        links = set[Link]().union(*(links_of(all_links(grid), 0) for grid in wired))
        count = len({channels_of(grids)[0], *channels_of(wired)})
        lines = [
            f"{count} communicators over {largest:,} ranks, about "
            f"{link_bytes(links, 0, settings.max_ctas) / 2**30:.2g} GiB of a GPU (estimate for "
            f"parallel.cp.max_ctas = {settings.max_ctas})"
        ]
    if inside:
        most = max(grid.size for grid in inside)
        layout = slot_layout(inside, range(most), CommunicatorOptions())
        lines.append(
            f"rings of up to {most} ranks: copies between GPUs of a node that reach each other's memory; each lends "
            f"{layout.num_bytes / 2**30:.2g} GiB (parallel.cp.peer_copies = {settings.peer_copies})"
        )
    return "\n".join(lines)


def check_picture(option: str, picture: Path) -> None:
    """Raise ValueError unless the directory of the picture that an option names exists."""
    if not picture.absolute().parent.is_dir():
        raise ValueError(f"{option} {picture}: {picture.absolute().parent} is not a directory; make it first")


def measure_on_this_machine(
    target: str, overrides: Sequence[str], found: GridChoice, preset: str, timeline: Path
) -> int:
    """Start the ranks of one context-parallel group on this machine to measure and draw; return an exit status."""
    arguments = [f"--grid={found.grid}", f"--tokens={found.kind.sequence_tokens}", f"--topology={preset}"]
    window = [f"--window={found.kind.window}"] if found.kind.window else []
    settings = [target, *overrides, *arguments, *window, f"--timeline={timeline}"]
    return start_ranks("longring.launch.commands.plan", settings, found.grid.size)


def _alternatives(recipe: Recipe, choice: GridChoice, topology: Topology, speed: Speed) -> list[PricedGrid]:
    """Return the grids that were not chosen, cheapest first."""
    if not choice.named:
        return choice.others
    asked = pricer(recipe, choice.kind, topology, speed)
    return [other for other in choose(choice.grid.size, asked) if other.grid != choice.grid]


def simulate_passes(pricer: Pricer, grid: CpGrid) -> list[Panel]:
    """Return one panel for each pass, from the simulator."""
    panels = []
    for direction in pricer.passes:
        price = play(pricer.schedule(grid, direction), pricer.topology, pricer.shape, pricer.speed, record=True)
        panels.append(Panel(grid, direction, f"simulated on {pricer.topology.name}", price.events))
    return panels


def measure_passes(recipe: Recipe, grid: CpGrid, num_tokens: int, visibility: Visibility) -> list[Panel]:
    """Run each pass on this group of ranks with random q, k, v; return a panel for each, on every rank. Collective."""
    # One group alone, without tensor parallelism: each rank has the heads of one tensor-parallel rank of a run.
    alone = replace(recipe.parallel, tensor=1, sequence_parallel=False)
    mesh = join(alone, grid.size, recipe.faults.collective_minutes)
    with Clock(mesh.rank, 60 * recipe.faults.hang_minutes) as clock:
        events = record_passes(recipe, grid, num_tokens, visibility, mesh, clock)
        clock.at(0, "gathering events")
        panels = []
        for direction, mine in events.items():
            gathered: list[list[Event]] = [[]] * grid.size  # by rank
            dist.all_gather_object(gathered, mine)
            panels.append(Panel(grid, direction, "measured", [event for of_rank in gathered for event in of_rank]))
    return panels


def record_passes(
    recipe: Recipe, grid: CpGrid, num_tokens: int, visibility: Visibility, mesh: Mesh, clock: Clock
) -> dict[Pass, list[Event]]:
    """Return the events of this rank in each pass. Collective."""
    clock.at(0, "opening channels")
    group = open_group(range(grid.size), [grid], mesh.communicator_options)
    shape, layout = attention_shape(recipe), zigzag(num_tokens, group.rank, grid.size)
    layouts = tuple(zigzag(num_tokens, rank, grid.size) for rank in range(grid.size))
    spec = AttentionSpec(grid, layouts, visibility, recipe.train.attention_backend, shape.narrow_results)
    q, k, v, dout = (  # [batch, tokens of the rank, heads, head dim]
        torch.randn(
            (shape.batch, layout.num_tokens, heads, shape.head_dim),
            dtype=getattr(torch, recipe.train.dtype),
            device=mesh.device,
        )
        for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads, shape.num_heads)
    )

    # Ranks start each pass together, so that times of different ranks share an origin.
    def recorder(direction: Pass) -> Recorded:
        clock.at(0, f"measuring {direction} over {grid.size} ranks")
        dist.barrier()
        return Recorded(group, spec.compiled(direction, group.rank), origin_s=time.perf_counter())

    # Every round replaces the events of the one before, so those of the last one are drawn.
    events: dict[Pass, list[Event]] = {}
    for _ in range(WARM_UP_PASSES + 1):
        first = recorder("forward")
        _, saved = first.drive(forward(spec, group.rank, q, k, v, first))
        second = recorder("backward")
        second.drive(backward(spec, group.rank, dout, saved, shape.num_kv_heads, second))
        events = {"forward": first.events, "backward": second.events}
    return events


def measured_speed(panels: Sequence[Panel], shape: AttentionShape, num_tokens: int, visibility: Visibility) -> Speed:
    """Return the speed at which the tiles of measured passes were computed, to simulate the same passes with."""
    rates: dict[Pass, float] = {}
    for panel in panels:
        grid = panel.grid
        layouts = [zigzag(num_tokens, rank, grid.size) for rank in range(grid.size)]
        pairs = Schedule(grid, layouts, visibility, panel.direction).pairs  # [owner of queries, owner of keys]
        tiles = [event for event in panel.events if isinstance(event.item, Tile)]
        # The tiles at unit speed take as many seconds as they have FLOPs.
        owners = [(e.item.query_owner, e.item.key_owner) for e in tiles if isinstance(e.item, Tile)]
        queries, keys = torch.tensor(owners).T.numpy()  # [tiles] each
        at_one = Speed(1.0, 1.0).seconds(pairs[queries, keys], shape, grid, panel.direction)
        rates[panel.direction] = float(at_one.sum()) / sum(event.stop_s - event.start_s for event in tiles)
    return Speed(rates["forward"], rates["backward"])


def draw_measured(
    recipe: Recipe, grid: CpGrid, num_tokens: int, visibility: Visibility, topology: Topology, file: Path
) -> None:
    """Measure, and draw the measured passes beside simulated ones with tiles of the measured speed. Collective."""
    panels = measure_passes(recipe, grid, num_tokens, visibility)
    if dist.get_rank():  # what follows is not collective
        return
    # Simulated with the measured speed of tiles, the two pictures differ in communication alone.
    shape = attention_shape(recipe)
    speed = measured_speed(panels, shape, num_tokens, visibility)
    played = simulate_passes(Pricer(num_tokens, shape, topology, speed, visibility), grid)
    draw(list(zip(panels, played, strict=True)), file, ranks_per_node=topology.ranks_per_node)
    for measured, other in zip(panels, played, strict=True):
        Console().print(
            f"{measured.direction}: measured {measured.total_s * 1e3:.4g} ms, {measured.exposed_s * 1e3:.3g} exposed; "
            f"simulated on {topology.name} with tiles of that speed: {other.total_s * 1e3:.4g} ms, "
            f"{other.exposed_s * 1e3:.3g} exposed",
            highlight=False,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rank of a measurement, as `longring plan --measure` starts it; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m longring.launch.commands.plan",
        description="Run one rank of a measurement. `longring plan --measure` starts it.",
    )
    parser.add_argument("recipe", help="recipe, a TOML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings that replace those of the recipe"
    )
    parser.add_argument("--grid", type=CpGrid.parse, required=True, help="grid to measure")
    parser.add_argument("--tokens", type=int, required=True, metavar="N", help="tokens of the sequence")
    parser.add_argument("--window", type=int, metavar="N", help="attention window (default: full attention)")
    parser.add_argument("--topology", choices=PRESETS, required=True, help="topology of the simulation")
    parser.add_argument("--timeline", type=Path, required=True, metavar="OUT.png", help="picture to draw")
    options = parser.parse_intermixed_args(arguments)
    return as_rank(
        lambda: draw_measured(
            load_recipe(options.recipe, options.overrides),
            options.grid,
            options.tokens,
            Visibility(window=options.window),
            PRESETS[options.topology](options.grid.size),
            options.timeline,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
