"""Deterministic runs have equal bits, and no run draws random numbers after its initial weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from longring.kernels.compilations import Compilations
from longring.launch import trainer
from longring.launch.config import load_recipe
from longring.launch.records import read_records
from longring.launch.train import train
from rich.console import Console

EXACT = ("step", "tokens", "loss", "bucket", "grad_norm")


def run_and_watch(recipe_file: Path, overrides: list[str]) -> tuple[bool, int]:
    """Train; return whether torch used deterministic operations, and the number of distinct random states."""
    states, sum_over_ranks, compilations = [], trainer.sum_over_ranks, Compilations()

    def watched(*arguments):
        states.append(torch.get_rng_state().numpy().tobytes())
        compilations.count += len(states) == 3  # as if a kernel of step 4 were compiled
        return sum_over_ranks(*arguments)

    trainer.sum_over_ranks = watched
    trainer.Compilations = lambda: compilations  # type: ignore[assignment]
    try:
        train(load_recipe(recipe_file, overrides), Console(quiet=True))
    finally:
        trainer.sum_over_ranks, trainer.Compilations = sum_over_ranks, Compilations
        asked = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)
    assert len(states) == 8
    return asked, len(set(states))


@pytest.mark.full
def test_deterministic_runs_are_equal_and_nothing_random_is_drawn(on_ranks, recipe_file, tmp_path):
    settings = ["train.steps=8", "parallel.tokens_per_rank=256", "train.global_batch_tokens=1024"]
    metrics = []
    for name, deterministic in (("a", True), ("b", True), ("c", False)):
        run = tmp_path / name
        words = [*settings, f"run_directory={run}", f"train.deterministic={str(deterministic).lower()}"]
        # A probe decides the grids, so a deterministic run does not measure; the other run must not either.
        words += [] if deterministic else ["parallel.cp.topology=full_mesh"]
        assert on_ranks(2, run_and_watch, recipe_file, words) == [(deterministic, 1)] * 2
        steps = read_records(run / "metrics.jsonl")
        assert [step["compilations"] for step in steps] == [0, 0, 0, 2, 0, 0, 0, 0], "those of both ranks, by step"
        metrics.append([[step[key] for key in EXACT] for step in steps])
    assert metrics[0] == metrics[1]
    assert metrics[0] == metrics[2], "on a CPU the switch changes no result"
