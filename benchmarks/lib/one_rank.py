"""A training step on one rank, of a model of any size, for benchmarks of the code around a step."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from longring.launch.build import bucket_layouts, build_engine
from longring.launch.config import Recipe, load_recipe
from longring.launch.grids.decide import decide_grids
from longring.parallel.mesh import Mesh, join
from longring.parallel.zero import DeepSpeedEngine, set_learning_rate

from . import ROOT
from .process import free_port

RECIPE = ROOT / "launch" / "recipes" / "demo.toml"
VOCABULARY = 8192


class OneRank(NamedTuple):
    """A run on one rank."""

    recipe: Recipe
    mesh: Mesh
    engine: DeepSpeedEngine
    step: Callable[[], None]
    """Runs forward, backward and update, always on the same tokens."""


def be_the_only_rank() -> None:
    """Set the environment of a world of one rank."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))


def one_rank(run_directory: Path, width: int, layers: int, tokens: int) -> OneRank:
    """Build the demo's model with `width` and `layers`; a step trains on `tokens` random tokens a micro-batch."""
    be_the_only_rank()
    shape = [f"model.hidden_size={width}", f"model.num_layers={layers}", f"model.ffn_hidden_size={3 * width}"]
    recipe = load_recipe(RECIPE, [*shape, "parallel.tokens_per_rank=2048", f"run_directory={run_directory}"])
    mesh = join(recipe.parallel, 1)
    engine = build_engine(recipe, VOCABULARY, mesh)
    set_learning_rate(engine, 1e-4)
    layout = bucket_layouts(recipe, mesh, [tokens], decide_grids(recipe, mesh, [tokens]))[tokens]
    rows = np.random.default_rng(0).integers(0, VOCABULARY, (1, tokens + 1)).astype(np.uint16)

    def step() -> None:
        for _ in range(engine.gradient_accumulation_steps()):
            losses = engine(*layout.model_inputs(rows, None, mesh.device))
            engine.backward(losses.mean())
            engine.step()
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()

    return OneRank(recipe, mesh, engine, step)


def count_parameters(engine: DeepSpeedEngine) -> int:
    """Return the number of parameters of the engine's model."""
    return sum(parameter.numel() for parameter in engine.parameters())
