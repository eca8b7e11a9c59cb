"""A run that is interrupted at random points of random steps and saves equals an uninterrupted run."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
from helpers.faulty import Fault, start
from longring.launch.checkpoint.format import (
    checkpoint_name,
    complete_checkpoints,
    find_damage,
    last_good_checkpoint,
    read_checkpoint_manifest,
)
from longring.launch.records import read_records
from safetensors.torch import load_file

EXACT = ("step", "tokens", "loss", "bucket", "cp", "learning_rate", "grad_norm")
STEPS = 60
OPERATIONS = ("building", "reading micro-batch 0", "forward", "reading micro-batch 1", "summing", "saving")


def settings(run: Path) -> list[str]:
    """Return settings with context parallelism in some steps and none in others, and a checkpoint every three steps."""
    return [
        f"train.steps={STEPS}",
        "train.checkpoint_every_steps=3",
        "parallel.tokens_per_rank=256",
        "train.global_batch_tokens=1024",
        "parallel.cp.topology=full_mesh",  # two runs that probe may choose different grids
        f"run_directory={run}",
    ]


def random_fault(chance: random.Random, done: int) -> Fault:
    """Return a signal to one rank within the next steps, or within the files of the next saves."""
    rank, action = chance.randrange(2), chance.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGUSR1"])
    if chance.random() < 0.4:
        return Fault(rank, action, chunk=chance.randrange(1, 80))
    step = done + chance.randrange(0, 6)
    return Fault(rank, action, step=step, operation="building" if step == done else chance.choice(OPERATIONS[1:]))


@pytest.mark.slow
@pytest.mark.parametrize("interruptions", [50])
def test_a_run_interrupted_at_random_equals_an_uninterrupted_one(recipe_file, tmp_path, interruptions):
    seed = int(os.environ.get("LONGRING_SEED", "0")) or random.randrange(1, 2**32)
    chance = random.Random(seed)
    hint = f"LONGRING_SEED={seed} repeats it"
    whole, run, output = tmp_path / "whole", tmp_path / "run", tmp_path / "output.txt"
    assert start(2, recipe_file, settings(whole), output).wait() == [0, 0], output.read_text()

    interrupted = 0
    while interrupted < interruptions:
        found = last_good_checkpoint(run / "checkpoints")
        done = found[1].state.step if found else 0
        if done > STEPS - 8:  # too few steps are left for the interruptions: start over
            shutil.rmtree(run)
            continue
        fault = random_fault(chance, done)
        statuses = start(2, recipe_file, settings(run), output, [fault]).wait()
        assert set(statuses) <= {-9, 0, 75}, f"{fault} -> {statuses}; {hint}\n{output.read_text()[-3000:]}"
        interrupted += any(statuses)
        for path in complete_checkpoints(run / "checkpoints"):
            wrong = find_damage(path, read_checkpoint_manifest(path))
            assert wrong is None, f"{fault}: {wrong}; {hint}"
    for _ in range(2):  # the second has nothing to train, and changes nothing
        assert start(2, recipe_file, settings(run), output).wait() == [0, 0], f"{hint}\n{output.read_text()}"

    ours, theirs = (
        [[step[key] for key in EXACT] for step in read_records(path / "metrics.jsonl")] for path in (run, whole)
    )
    assert ours == theirs, hint
    name = checkpoint_name(STEPS)
    for file in sorted((whole / "checkpoints" / name).glob("*.safetensors")):
        exact, found_there = load_file(file), load_file(run / "checkpoints" / name / file.name)
        assert exact.keys() == found_there.keys()
        assert all(exact[key].equal(found_there[key]) for key in exact), hint
