"""Runs with the parameters that Llama lacks: tied, divided vectors and norms of heads, over meshes and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.small_checkpoint import read_whole
from longring.launch.config import load_recipe
from longring.launch.train import train
from rich.console import Console

STEPS = 4
WINDOWED = ["model.window_tokens=40", "model.layer_pattern=['window', 'full']"]
MODELS = {
    "projection norms": [
        *WINDOWED,
        *("model.qkv_bias=true", "model.qk_norm=projection", "model.norm_order=after", "model.tied_head=true"),
        "model.rope_scaling={kind='yarn', factor=4, original_tokens=128, full_layers_only=true}",
    ],
    "head norms": [
        *("model.qk_norm=head", "model.head_dim=24", "model.tied_head=true", "model.z_loss=1e-2"),
        "model.layer_pattern=['full', 'full_no_rope']",
    ],
}
ONE = (1, ["parallel.zero_stage=0"])
MESHES = {
    "tensor 2, ZeRO 1": (2, ["parallel.zero_stage=1", "parallel.tensor=2", "parallel.sequence_parallel=true"]),
    "rings, ZeRO 3": (2, ["parallel.zero_stage=3", "parallel.tokens_per_rank=256"]),
    "tensor 2, ZeRO 3": (4, ["parallel.zero_stage=3", "parallel.tensor=2"]),
    "ZeRO 2": (2, ["parallel.zero_stage=2"]),
}
PAIRS = [("tensor 2, ZeRO 1", "rings, ZeRO 3"), ("tensor 2, ZeRO 3", "ZeRO 2"), ("ZeRO 2", "tensor 2, ZeRO 1")]


def run_steps(recipe_file: Path, overrides: list[str], stop_after: int) -> None:
    train(load_recipe(recipe_file, overrides), Console(quiet=True), stop_after)


def metrics(run: Path) -> np.ndarray:
    """Return loss and gradient norm of every step, [steps, 2]."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return np.array([[step["loss"], step["grad_norm"]] for step in steps])


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), PAIRS)
@pytest.mark.parametrize("model", MODELS)
def test_a_run_changes_its_mesh_and_equals_one_rank(on_ranks, recipe_file, tmp_path, model, before, after):
    common = [*MODELS[model], "parallel.tokens_per_rank=512"]
    world, mesh = ONE
    on_ranks(world, run_steps, recipe_file, [*common, *mesh, f"run_directory={tmp_path}/one"], STEPS)
    for stop, name in ((STEPS // 2, before), (STEPS, after)):
        world, mesh = MESHES[name]
        on_ranks(world, run_steps, recipe_file, [*common, *mesh, f"run_directory={tmp_path}/two"], stop)
    np.testing.assert_allclose(metrics(tmp_path / "two"), metrics(tmp_path / "one"), rtol=2e-5)
    saved = read_whole(tmp_path / "two" / "checkpoints" / f"step-{STEPS:08d}")
    assert "head.weight/weight" not in saved
    assert saved["embedding.weight/weight"].shape == (512, 64)
