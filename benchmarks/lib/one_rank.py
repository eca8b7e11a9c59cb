"""A training step on one rank, of a model of any size, for benchmarks of what surrounds it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
os.environ["MASTER_PORT"] = str(20_000 + os.getpid() % 10_000)
import numpy as np
import torch
from longring.launch.build import bucket_layouts, build_engine
from longring.launch.config import Recipe, load_recipe
from longring.launch.grids.decide import decide_grids
from longring.parallel.mesh import Mesh, join
from longring.parallel.zero import DeepSpeedEngine, set_learning_rate

RECIPE = Path(__file__).parents[1] / "launch" / "recipes" / "demo.toml"
VOCABULARY = 8192


class OneRank(NamedTuple):
    """What a run on one rank consists of."""

    recipe: Recipe
    mesh: Mesh
    engine: DeepSpeedEngine
    step: Callable[[], None]
    """Forward, backward and update on the same tokens."""


def one_rank(run_directory: Path, width: int, layers: int, tokens: int) -> OneRank:
    """The demo's model with these sizes; steps of `tokens` random tokens, accumulated as the recipe says."""
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
