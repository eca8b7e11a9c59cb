"""`longring topology`: the links between ranks and their attention speed, measured and printed.

    srun --ntasks-per-node 1 torchrun --nnodes $SLURM_NNODES --nproc-per-node 8 --rdzv-backend c10d \\
        --rdzv-endpoint HOST:PORT -m longring.launch.commands.topology [RECIPE] [--json FILE]

measures a cluster. `longring topology [RECIPE]` starts the ranks of one machine itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from ...data.files import write_text
from ...parallel.config import ParallelConfig
from ...parallel.cp.fit import Fit
from ...parallel.cp.group import CommunicatorOptions
from ...parallel.cp.probe import Probe, probe
from ...parallel.cp.topology import Fabric
from ...parallel.device import this_device
from ...parallel.meet import meet
from ...parallel.world import World
from ..config import FaultsConfig, load_recipe
from ..fit.device import Device, device_json
from ..fit.measure import Sizes, measure_device
from ..grids.choice import attention_shape
from ..ranks.clock import Clock
from ..ranks.rank import as_rank
from ..ranks.start import local_ranks, start_ranks
from ..tables import plain_table

TIMEOUT = timedelta(minutes=5)
"""Longest wait for another rank to start."""
MOST_TOKENS = 1024
"""Most tokens of the products that are timed; more are no faster."""


def start_probe(
    target: str | None, overrides: Sequence[str], configured: int, *, ranks: int | None, json_file: str | None
) -> int:
    """Start the ranks of a probe on this machine; return an exit status. Raises ValueError for fewer than two ranks."""
    count = ranks or local_ranks(configured)
    if count < 2:
        raise ValueError(f"--ranks {count}: one rank has no links to measure; start two or more, with --ranks 2")
    recipe = [target, *overrides] if target else []
    output = ["--json", json_file] if json_file else []
    return start_ranks("longring.launch.commands.topology", [*recipe, *output], count)


def show_topology(recipe_file: str | None, overrides: Sequence[str], json_file: Path | None, console: Console) -> None:
    """Measure all ranks; rank 0 prints the result and writes it to `json_file`. Collective.

    Without a recipe, attention has the heads of Llama-3-8B, in bfloat16, and products are 1,024 by 8,192. Raises
    ValueError if the recipe cannot be read.
    """
    heads, head_dim, dtype, backend = (32, 8), 128, torch.bfloat16, "auto"
    sizes = Sizes(tokens=512, hidden=1024, ffn=4096)
    faults, parallel = FaultsConfig(), ParallelConfig(tokens_per_rank=1)
    if recipe_file is not None:
        recipe = load_recipe(recipe_file, overrides)
        shape = attention_shape(recipe)
        heads, head_dim = (shape.num_heads, shape.num_kv_heads), shape.head_dim
        dtype, backend = getattr(torch, recipe.train.dtype), recipe.train.attention_backend
        faults, parallel, model = recipe.faults, recipe.parallel, recipe.model
        tokens = min(MOST_TOKENS, parallel.tokens_per_rank)
        sizes = Sizes(tokens, model.hidden_size, model.ffn_hidden_size // parallel.tensor)
    world, minutes = World.from_environment(), faults.collective_minutes
    device = this_device(parallel, world, minutes)
    links = "nccl" if device.type == "cuda" else "gloo"
    store = meet(world, TIMEOUT)
    timeout = timedelta(minutes=minutes)
    dist.init_process_group(links, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
    cp = parallel.cp
    options = CommunicatorOptions(cp.max_ctas, cp.high_priority, timeout, cp.peer_copies)
    with Clock(world.rank, 60 * faults.hang_minutes) as clock:  # seconds
        clock.at(0, "measuring the links")
        found = probe(*heads, head_dim, dtype, device, backend=backend, options=options)
        clock.at(0, "measuring the ranks")
        measured = measure_device(sizes, dtype, device, found.speed, found.topology)
    if dist.get_rank() == 0:
        tile = f"{heads[0]} query and {heads[1]} kv heads of {head_dim}, {str(dtype).removeprefix('torch.')}"
        for table in topology_tables(found, tile, device.type, measured):
            console.print(table)
        if json_file is not None:
            tree = {**json.loads(found.to_json()), "device": device_json(measured)}
            write_text(json_file, json.dumps(tree, indent=1) + "\n")


def topology_tables(found: Probe, tile: str, device: str, rates: Device) -> list[Table]:
    """Return two tables: what was measured, and the error with which each kind of fabric fits the times."""
    topology, speed = found.topology, found.speed
    summary = plain_table("Topology")
    summary.add_row("nodes", f"{found.num_nodes:,}")
    summary.add_row("ranks on a node", f"{topology.ranks_per_node:,} on {device}")
    sides = {"inside a node": topology.inside, "inside, by copies": topology.copies, "across nodes": topology.across}
    for side, fabric in sides.items():
        # One node has no links across nodes, and one rank on a node none inside it.
        if fabric is not None and (side != "inside a node" or topology.ranks_per_node > 1):
            summary.add_row(side, _name(fabric))
            summary.add_row("  a link and direction", f"{fabric.bytes_per_s / 1e9:.3g} GB/s")
            summary.add_row("  latency", f"{1e6 * fabric.latency_s:.0f} µs")
    summary.add_row("attention forward", f"{speed.forward_flops / 1e9:,.1f} GFLOP/s a rank")
    summary.add_row("attention backward", f"{speed.backward_flops / 1e9:,.1f} GFLOP/s a rank")
    summary.add_row("  overhead of a tile", f"{1e6 * speed.tile_s:.0f} µs")
    summary.add_row("  tiles of", tile)
    summary.add_row("matrix products", f"{rates.product_flops / 1e9:,.1f} GFLOP/s a rank")
    summary.add_row("norms and SwiGLU", f"{rates.operator_bytes_per_s / 1e9:,.2f} GB/s a rank")
    summary.add_row("AdamW", f"{rates.update_bytes_per_s / 1e9:,.2f} GB/s a rank")
    summary.add_row("sums over all ranks", f"{rates.link_share:.0%} of the links' bandwidth")
    summary.add_row("duration of the probe", f"{found.seconds:.1f} s")
    title = "Error of each kind of fabric against the measured times"
    fits = plain_table(title, "where", "fabric", "GB/s", "error", left=["where", "fabric"])
    for side, found_fits in (("inside", found.inside), ("copies", found.copies), ("across", found.across)):
        for one in found_fits:
            fits.add_row(side, *_row(one))
    return [summary, fits]


def _row(one: Fit) -> tuple[str, str, str]:
    return _name(one.fabric), f"{one.fabric.bytes_per_s / 1e9:.3g}", f"{one.error:.0%}"


def _name(fabric: Fabric) -> str:
    ports = f", {fabric.ends_per_port} ranks a port" if fabric.ends_per_port > 1 else ""
    return f"{fabric.kind}{ports}{'' if fabric.full_duplex else ', one direction at a time'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rank of a probe, as torchrun starts it; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m longring.launch.commands.topology",
        description="Run one rank of a probe. Start it with torchrun, or use `longring topology`.",
        epilog="example: torchrun --nproc-per-node 4 -m longring.launch.commands.topology launch/recipes/demo.toml",
    )
    parser.add_argument("recipe", nargs="?", help="recipe, a TOML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings that replace those of the recipe"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measured topology to FILE")
    options = parser.parse_intermixed_args(arguments)
    return as_rank(lambda: show_topology(options.recipe, options.overrides, options.json, Console()))


if __name__ == "__main__":
    sys.exit(main())
