"""A run that stopped and went on is the run that never stopped: metrics, weights and moments, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from longring.launch import checkpoint
from longring.launch.config import load_recipe
from longring.launch.metrics import keep_steps, read_metrics
from longring.launch.train import train
from rich.console import Console

EXACT = ("step", "tokens", "loss", "bucket", "cp", "learning_rate", "grad_norm")


def run_until(recipe_file: Path, overrides: list[str], stop_after: int | None) -> None:
    train(load_recipe(recipe_file, overrides), Console(quiet=True), stop_after)


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Paths at which two checkpoints' contents differ."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [path]
        return [d for key in a for d in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [path]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}[{i}]")]
    if isinstance(a, str | int | float | bool | type(None)):
        return [] if a == b else [path]
    return []


def keys(content: Any) -> set[str]:
    """All keys of nested dictionaries."""
    if isinstance(content, dict):
        return {str(key) for key in content}.union(*map(keys, content.values()))
    return set().union(*map(keys, content)) if isinstance(content, list | tuple) else set()


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.zero_stage=0"],
        ["parallel.zero_stage=1"],
        ["parallel.zero_stage=2", "train.dtype=bfloat16"],
        ["parallel.zero_stage=3"],
        ["parallel.zero_stage=1", "parallel.tensor=2", "parallel.tokens_per_rank=256"],
    ],
    ids=["zero0", "zero1", "zero2-bf16", "zero3", "zero1-tp2"],
)
def test_interrupted_equals_uninterrupted(on_ranks, recipe_file, tmp_path, overrides):
    # A named topology: of two runs that probe, each in its own directory, one might take another grid.
    steps = ["train.steps=12", "train.checkpoint_every_steps=5", "parallel.cp.topology=full_mesh"]
    overrides = ["parallel.tokens_per_rank=128", *steps, *overrides]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    on_ranks(4, run_until, recipe_file, [*overrides, f"run_directory={whole}"], None)
    on_ranks(4, run_until, recipe_file, [*overrides, f"run_directory={parts}"], 5)
    # As after a crash past the checkpoint: records of steps that will be done again, and a save cut short.
    with (parts / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "loss": 99.0}) + '\n{"step": 7, "lo')
    shutil.copytree(parts / "checkpoints" / "step-00000005", parts / "checkpoints" / "step-00000012.partial")
    on_ranks(4, run_until, recipe_file, [*overrides, f"run_directory={parts}"], None)

    ours, theirs = read_metrics(parts / "metrics.jsonl"), read_metrics(whole / "metrics.jsonl")
    assert [[step[key] for key in EXACT] for step in ours] == [[step[key] for key in EXACT] for step in theirs]
    last = "checkpoints/step-00000012"
    files = sorted(path.name for path in (whole / last).glob("*.pt"))
    assert files == sorted(path.name for path in (parts / last).glob("*.pt"))
    compared = set()
    for name in files:
        a, b = (torch.load(run / last / name, weights_only=False) for run in (whole, parts))
        assert differences(a, b) == [], name
        compared |= keys(a)
    assert "exp_avg" in compared, "the moments are among what was compared"


def test_the_comparison_sees_one_flipped_bit():
    a = {"x": [torch.zeros(3), {"y": 1}]}
    assert differences(a, {"x": [torch.zeros(3), {"y": 1}]}) == []
    assert differences(a, {"x": [torch.tensor([0, 0, 1e-30]), {"y": 1}]}) == [".x[0]"]
    assert differences(a, {"x": [torch.zeros(3), {"y": 2}]}) == [".x[1].y"]


def test_keep_steps_drops_what_came_after_and_what_was_cut_short(tmp_path):
    file = tmp_path / "metrics.jsonl"
    keep_steps(file, 3)
    assert not file.exists()
    file.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)) + '{"st')
    keep_steps(file, 3)
    assert [step["step"] for step in read_metrics(file)] == [1, 2, 3]


def test_latest_ignores_partial_checkpoints(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    for name in ("step-00000010", "step-00000090.partial", "step-00000100"):
        (tmp_path / name).mkdir()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000100"
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.read_state(tmp_path / "step-00000100")


def test_a_checkpoint_of_another_world_or_other_data_is_refused():
    state = checkpoint.TrainState(step=5, world_size=4, data="a" * 64)
    checkpoint.check(state, Path("c"), world_size=4, data="a" * 64)
    with pytest.raises(ValueError, match="written by 4 ranks and this world has 2"):
        checkpoint.check(state, Path("c"), world_size=2, data="a" * 64)
    with pytest.raises(ValueError, match="manifest has SHA-256 aaaaaaaa.* has bbbb"):
        checkpoint.check(state, Path("c"), world_size=4, data="b" * 64)
