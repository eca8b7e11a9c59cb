"""`longring plan --gpus N --device NAME`: memory and time of a recipe before any rank starts, and settings that fit."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from rich.console import Console

from ...data.format.manifest import Manifest
from ...parallel.cp.topology import Topology
from ..config import Recipe
from ..fit.device import SHEETS, Device, measured_device, named_device
from ..fit.links import assumed_topology, preset_of
from ..fit.search import Planner
from ..fit.show import answer, lines, tables, to_json
from ..grids.choice import check_named_grids
from ..preflight import order_of, prepared_data


def show_fit(recipe: Recipe, console: Console, options: argparse.Namespace) -> None:
    """Print the plan of a recipe on the GPUs that the options name. Raises ValueError for options that do not fit."""
    for given, missing in (("gpus", "device"), ("device", "gpus")):
        if getattr(options, given) and not getattr(options, missing):
            example = "--device h100" if missing == "device" else "--gpus 64"
            raise ValueError(f"--{given} {getattr(options, given)}: needs --{missing}; add {example}")
    for other in ("timeline", "measure", "mix", "ranks"):
        if getattr(options, other):
            raise ValueError(f"--{other}: has no part in a plan with --gpus; leave out --gpus and --device")
    check_named_grids(recipe)
    device, topology, origin = _device(recipe, options.device, options.gpus, options.topology)
    manifest = prepared_data(recipe)
    vocab_size = manifest.vocab_size if manifest else recipe.data.tokenizer.vocab_size
    tokens, passes = _trained(manifest, recipe) if manifest else ({}, None)
    found = answer(Planner(recipe, options.gpus, vocab_size, device, topology, tokens), passes)
    if options.json:
        print(json.dumps(to_json(found), indent=1))
        return
    console.print(_head(found.planner, origin), highlight=False, soft_wrap=True)
    for table in tables(found):
        console.print(table)
    for line in lines(found):
        console.print(line, highlight=False)


def _device(recipe: Recipe, name: str, ranks: int, preset: str | None) -> tuple[Device, Topology, str]:
    """Return the device, the links between all ranks, and the origin of the links."""
    measured = None
    if name not in SHEETS and Path(name).is_file():
        device, measured = measured_device(Path(name))
    else:
        device = named_device(name, recipe.train.attention_backend)
        if recipe.train.dtype != "bfloat16":
            raise ValueError(
                f"train.dtype = {recipe.train.dtype!r}: --device {name} has the limits of bfloat16; set train.dtype = "
                "bfloat16, or measure a device with `longring topology`"
            )
    if measured is not None and preset is None:
        return device, measured, f"measured in {name}"
    preset, origin = preset_of(recipe, ranks, preset)
    return device, assumed_topology(preset, ranks, name), origin


def _trained(manifest: Manifest, recipe: Recipe) -> tuple[Counter[int], float]:
    """Return the tokens that the whole run trains of each bucket, and its passes over the buckets in use."""
    cells = order_of(manifest, recipe).trained(recipe.train.steps)
    tokens: Counter[int] = Counter()
    for cell in cells:
        tokens[cell.length] += cell.tokens
    # `available` counts sequences, so the divisor is the tokens of one pass.
    return tokens, tokens.total() / max(1, sum(cell.available * cell.length for cell in cells))


def _head(planner: Planner, origin: str) -> str:
    recipe, device, topology = planner.recipe, planner.device, planner.topology
    inside = f"{topology.inside.bytes_per_s / 1e9:.3g} GB/s a rank"
    across = f", {topology.across.bytes_per_s / 1e9:.3g} across nodes" if topology.across else ""
    ranks = f"{planner.world_size:,} rank{'s' * (planner.world_size > 1)}"
    steps = recipe.accumulation_steps(planner.world_size)
    return (
        f"{ranks}, {recipe.parallel.tokens_per_rank:,} tokens on each, "
        f"{steps:,} micro-batch{'es' * (steps > 1)} a step; vocabulary of "
        f"{recipe.model.num_tokens(planner.vocab_size):,}\n"
        f"device: {device.name}, {device.memory_bytes / 2**30:.1f} GiB; peak {device.peak_flops / 1e12:.4g} TFLOP/s, "
        f"products reach {device.product_flops / 1e12:.4g}, attention {device.attention.forward_flops / 1e12:.4g} "
        f"forward and {device.attention.backward_flops / 1e12:.4g} backward, operators "
        f"{device.operator_bytes_per_s / 1e12:.3g} TB/s\n"
        f"topology: {topology.name} ({origin}), {inside}{across}, of which collectives reach {device.link_share:.0%}"
    )
