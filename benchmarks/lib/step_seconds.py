"""Seconds of a training step by the length of its sequences and the way in which they were made, measured in turns."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from longring.data.format.manifest import Manifest, open_prepared
from longring.data.read.loader import read_rows
from longring.launch.build import BucketLayout, bucket_layouts, build_engine
from longring.launch.config import load_recipe
from longring.launch.grids.decide import decide_grids
from longring.parallel.mesh import Mesh, join
from longring.parallel.zero import DeepSpeedEngine, set_learning_rate

from .one_rank import be_the_only_rank


def step_seconds(recipe_file: Path, arms: Mapping[str, Sequence[str]], rounds: int) -> dict[str, dict[int, float]]:
    """Return the median seconds of a step on one rank, by arm and length of its sequences.

    `arms` are settings of data that is prepared, with one tokenizer. A step on sequences without document boundaries is
    the same computation whatever made them, so a length of several such arms is measured once. All lengths take a step
    in each round, so that a change of the machine's load meets all of them alike. On a CPU they are CPU seconds of this
    process.
    """
    be_the_only_rank()
    recipes = {arm: load_recipe(recipe_file, settings) for arm, settings in arms.items()}
    manifests = {arm: open_prepared(recipe.data.directory) for arm, recipe in recipes.items()}
    first = next(iter(recipes.values()))
    mesh = join(first.parallel, 1)
    engine = build_engine(first, next(iter(manifests.values())).vocab_size, mesh)
    set_learning_rate(engine, first.train.learning_rate)
    kinds = {arm: arm if manifests[arm].needs_starts else "without boundaries" for arm in arms}
    measured_by: dict[tuple[str, int], str] = {}
    for arm, recipe in recipes.items():
        for length in recipe.lengths:
            measured_by.setdefault((kinds[arm], length), arm)
    layouts = {
        (kind, length): bucket_layouts(recipes[arm], mesh, [length], decide_grids(recipes[arm], mesh, [length]))[length]
        for (kind, length), arm in measured_by.items()
    }
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in layouts}
    for number in range(rounds + 1):
        for key, layout in layouts.items():
            taken[key].append(_step(engine, mesh, manifests[measured_by[key]], layout, number))
    # The first round allocates memory.
    return {arm: {length: median(taken[kinds[arm], length][1:]) for length in recipes[arm].lengths} for arm in arms}


def _step(engine: DeepSpeedEngine, mesh: Mesh, manifest: Manifest, layout: BucketLayout, number: int) -> float:
    """Return the seconds of a step on the sequences of a bucket from the `number`-th step of them on."""
    [bucket] = [bucket for bucket in manifest.buckets("train") if bucket.length == layout.length]
    reader, clock = manifest.reader(bucket), time.perf_counter if mesh.device.type == "cuda" else time.process_time
    steps = engine.gradient_accumulation_steps()
    began = clock()
    for micro_batch in range(number * steps, (number + 1) * steps):
        first = micro_batch * layout.sequences_per_replica
        numbers = (first + np.arange(layout.sequences_per_replica)) % bucket.sequences
        rows, starts, _ = read_rows(reader, numbers, manifest.needs_starts, None)
        losses = engine(*layout.model_inputs(rows, starts, mesh.device))
        engine.backward(losses.mean())
        engine.step()
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began
