"""All that a start and its steps ask of process groups, in an order in which no ranks wait for each other on NCCL."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.lanes import by_lane
from helpers.nccl_rules import Call, deadlock, messages_of, recorded
from longring.data.prepare.prepare import prepare
from longring.launch.config import load_recipe
from longring.launch.evaluate import evaluate
from longring.launch.train import train
from rich.console import Console

# The first of two layers has an attention window: it has a grid of its own, and sees few ranks.
WINDOWED = ["model.window_tokens=40", "model.layer_pattern=['window', 'full']"]
# Sequences of several documents.
PACKED = ["data.rest=pack", "data.max_bucket_tokens=128", "parallel.tokens_per_rank=32"]
HEADS = ["parallel.cp.schedule_of={2 = 'heads=2', 4 = 'heads=2, query=2'}"]
RUNS = {
    # In bf16 ZeRO 1 sums gradients between the messages of the last backward.
    "probed": ["parallel.tokens_per_rank=128", "train.dtype=bfloat16", *WINDOWED],
    "heads-zero3": ["parallel.tokens_per_rank=128", "parallel.zero_stage=3", *HEADS],
    "tensor-zero2": ["parallel.tokens_per_rank=256", "parallel.tensor=2", "parallel.zero_stage=2"],
    "sequence-parallel": ["parallel.tokens_per_rank=256", "parallel.tensor=2", "parallel.sequence_parallel=true"],
    "packed": [*PACKED, *WINDOWED, "parallel.cp.schedule=grid", "parallel.cp.layout=balanced"],
}
"""Runs on four ranks: with buckets of 64 to 512 tokens, on rings of 1, 2 and 4 of them."""


HANG_MINUTES = 40


def calls_of_a_start(
    recipe_file: Path, overrides: list[str], stop_after: int | None
) -> tuple[list[Call], list[timedelta]]:
    """Train, or evaluate where no step is left; return this rank's calls, and the time limits of its process groups.

    The limits are without that of the world's group, which the tests make.
    """
    recipe = load_recipe(recipe_file, ["parallel.zero.reduce_bucket_size=8192", *overrides])
    with recorded() as calls:
        if stop_after is None:
            evaluate(recipe, Console(quiet=True))
        else:
            train(recipe, Console(quiet=True), stop_after)
    groups = [group for group in dist.distributed_c10d._world.pg_map if group is not dist.group.WORLD]
    return calls, [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


@pytest.mark.parametrize("name", by_lane(RUNS, quick=[], slow=[name for name in RUNS if name != "probed"]))
def test_no_rank_waits_for_another_in_a_cycle(on_ranks, recipe_file, tmp_path, name):
    """Probe, guards, DeepSpeed's and Megatron's collectives, rings of every size, saves: six steps, four resumed ones,
    and an evaluation."""
    overrides = [*RUNS[name], f"run_directory={tmp_path}/run", "train.steps=10", "train.checkpoint_every_steps=5"]
    overrides.append(f"faults.hang_minutes={HANG_MINUTES}")
    if name == "packed":
        overrides.append(f"data.directory={tmp_path}/data")
        prepare(load_recipe(recipe_file, overrides).data, Console(quiet=True))
    for stop_after in (6, 10, None):
        ranks, limits = zip(*on_ranks(4, calls_of_a_start, recipe_file, overrides, stop_after), strict=True)
        # The watchdog says more about a hang than a collective that runs out of time, so it comes first.
        assert {limit for of_rank in limits for limit in of_rank} == {timedelta(minutes=2 * HANG_MINUTES)}
        assert all(messages_of(calls) for calls in ranks)
        for rule in ("first use", "one queue"):
            assert deadlock(ranks, rule) is None
