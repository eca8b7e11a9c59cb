"""A resumed run equals an uninterrupted one bit for bit: metrics, weights and moments."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.lanes import by_lane
from longring.launch.checkpoint.format import read_checkpoint_manifest
from longring.launch.config import load_recipe
from longring.launch.metrics import keep_steps
from longring.launch.records import read_records
from longring.launch.train import train
from rich.console import Console
from safetensors.torch import load_file

EXACT = ("step", "tokens", "loss", "bucket", "cp", "learning_rate", "grad_norm")


def run_until(recipe_file: Path, overrides: list[str], stop_after: int | None) -> None:
    train(load_recipe(recipe_file, overrides), Console(quiet=True), stop_after)


def contents(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint, flat, by tensor-parallel slice and name."""
    manifest = read_checkpoint_manifest(checkpoint)
    parts = {}
    for file, entry in sorted(manifest.files.items()):
        for key, tensor in load_file(checkpoint / file).items():
            name = key.rpartition("/")[0]
            parts.setdefault((key, entry.slice), []).append((entry.ranges[name][0], tensor))
    return {
        f"{number}/{key}": torch.cat([tensor for _, tensor in sorted(found, key=lambda part: part[0])])
        for (key, number), found in parts.items()
    }


def differences(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that are not in both with equal bits."""
    return [name for name in a.keys() | b.keys() if name not in a or name not in b or not torch.equal(a[name], b[name])]


DIVISIONS = {
    "zero0": ["parallel.zero_stage=0"],
    "zero0-bf16": ["parallel.zero_stage=0", "train.dtype=bfloat16"],
    "zero1": ["parallel.zero_stage=1"],
    "zero1-bf16": ["parallel.zero_stage=1", "train.dtype=bfloat16"],
    "zero2-bf16": ["parallel.zero_stage=2", "train.dtype=bfloat16"],
    "zero3": ["parallel.zero_stage=3"],
    "zero1-tp2": ["parallel.zero_stage=1", "parallel.tensor=2", "parallel.tokens_per_rank=256"],
}


@pytest.mark.parametrize("division", by_lane(DIVISIONS, quick=[], slow=["zero0", "zero0-bf16", "zero1", "zero2-bf16"]))
def test_interrupted_equals_uninterrupted(on_ranks, recipe_file, tmp_path, division):
    # The topology is named, since two runs that probe may choose different grids.
    steps = ["train.steps=12", "train.checkpoint_every_steps=5", "parallel.cp.topology=full_mesh"]
    overrides = ["parallel.tokens_per_rank=128", "train.global_batch_tokens=1024", *steps, *DIVISIONS[division]]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    on_ranks(4, run_until, recipe_file, [*overrides, f"run_directory={whole}"], None)
    on_ranks(4, run_until, recipe_file, [*overrides, f"run_directory={parts}"], 5)
    # The files of a crash after the checkpoint: records of steps that are done again, and an interrupted save.
    with (parts / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "loss": 99.0}) + '\n{"step": 7, "lo')
    shutil.copytree(parts / "checkpoints" / "step-00000005", parts / "checkpoints" / "step-00000012.partial")
    on_ranks(4, run_until, recipe_file, [*overrides, f"run_directory={parts}"], None)

    ours, theirs = read_records(parts / "metrics.jsonl"), read_records(whole / "metrics.jsonl")
    assert [[step[key] for key in EXACT] for step in ours] == [[step[key] for key in EXACT] for step in theirs]
    a, b = (contents(run / "checkpoints" / "step-00000012") for run in (whole, parts))
    assert differences(a, b) == []
    assert any(name.endswith("/exp_avg") for name in a), "the moments are compared too"


def test_the_comparison_sees_one_flipped_bit():
    a = {"x": torch.zeros(3)}
    assert differences(a, {"x": torch.zeros(3)}) == []
    assert differences(a, {"x": torch.tensor([0, 0, 1e-30])}) == ["x"]
    assert differences(a, {"x": torch.zeros(3), "y": torch.zeros(1)}) == ["y"]


def test_keep_steps_drops_what_came_after_and_what_was_cut_short(tmp_path):
    file = tmp_path / "metrics.jsonl"
    keep_steps(file, 3)
    assert not file.exists()
    file.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)) + '{"st')
    keep_steps(file, 3)
    assert [step["step"] for step in read_records(file)] == [1, 2, 3]
