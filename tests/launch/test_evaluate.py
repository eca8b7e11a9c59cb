"""Held-out losses over several ranks against plain PyTorch in fp64, on the weights of the checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.lanes import by_lane
from helpers.plain_model import plain_losses
from helpers.small_checkpoint import read_whole
from longring.data.format.manifest import open_prepared
from longring.launch.config import load_recipe
from longring.launch.evaluate import evaluate
from longring.launch.evaluation.held_out import powers_of_two
from longring.launch.report.evaluation_tables import evaluation_tables
from longring.launch.run_directory import RunDirectory
from longring.launch.train import train
from rich.console import Console


def train_and_evaluate(recipe_file: Path, overrides: list[str]) -> None:
    recipe = load_recipe(recipe_file, overrides)
    train(recipe, Console(quiet=True), stop_after=2)
    too_low = replace(recipe, evaluate=replace(recipe.evaluate, max_tokens_per_bucket=1))
    advice = "raise it, or prepare other data with a larger data.held_out_fraction"
    with pytest.raises(ValueError, match=f"no held-out sequence of .* is that short; {advice}"):
        evaluate(too_low, Console(quiet=True))
    evaluate(recipe, Console(quiet=True))


@pytest.mark.parametrize("cap", by_lane([2**20, 700], quick=[]), ids=["all", "capped"])
def test_equals_plain_pytorch_by_bucket_and_position(on_ranks, recipe_file, tmp_path, cap):
    """With at most 700 tokens, ten sequences of 64 and one of 512, so that micro-batches are not full."""
    overrides = ["parallel.tokens_per_rank=128", f"run_directory={tmp_path}", f"evaluate.max_tokens_per_bucket={cap}"]
    on_ranks(4, train_and_evaluate, recipe_file, overrides)
    result = json.loads((tmp_path / "evaluation.json").read_text())

    recipe = load_recipe(recipe_file)
    manifest = open_prepared(recipe.data.directory)
    saved = read_whole(tmp_path / "checkpoints" / "step-00000002")
    weights = {
        name.removesuffix("/weight"): torch.from_numpy(value).double()
        for name, value in saved.items()
        if name.endswith("/weight")
    }
    counts = manifest.unigram()
    chance = (counts + 1) / (counts + 1).sum()
    total = 0
    held_out = [b for b in manifest.buckets("held_out") if min(b.sequences, cap // b.length)]
    assert [entry["bucket"] for entry in result["buckets"]] == [bucket.length for bucket in held_out]
    for bucket, entry in zip(held_out, result["buckets"], strict=True):
        number = min(bucket.sequences, cap // bucket.length)
        rows = manifest.reader(bucket).read(np.arange(number) * bucket.sequences // number)  # evenly over the bucket
        whole_rows = torch.from_numpy(rows).long()
        losses = plain_losses(weights, whole_rows, recipe.model, vocab_size=manifest.vocab_size).numpy()
        assert entry["tokens"] == losses.size
        assert entry["loss"] == pytest.approx(losses.mean(), rel=1e-5)
        assert entry["unigram_loss"] == pytest.approx(-np.log(chance[rows[:, 1:]]).mean(), rel=1e-9)
        for part in entry["by_position"]:
            expected = losses[:, part["from"] : part["to"]]
            assert part["tokens"] == expected.size
            assert part["loss"] == pytest.approx(expected.mean(), rel=1e-5)
        assert sum(part["tokens"] for part in entry["by_position"]) == losses.size
        total += losses.size
    assert result["tokens"] == total
    assert result["step"] == 2
    assert 0 < result["loss"] < 2 * math.log(manifest.vocab_size)


def test_edges_of_positions_are_the_bucket_lengths():
    assert powers_of_two(64, 512) == [0, 64, 128, 256, 512]
    assert powers_of_two(64, 64) == [0, 64]


def test_eight_buckets_are_one_table_at_80_columns(capsys):
    """Positions are rows, so a loss needs the width of its bucket alone."""
    edges = powers_of_two(64, 8192)
    parts = [{"from": first, "to": stop, "loss": 5 + stop / 1e4} for first, stop in pairwise(edges)]
    entries = [
        {"bucket": stop, "cp": 1, "tokens": stop, "loss": 6.0, "unigram_loss": 7.0, "by_position": parts[: number + 1]}
        for number, stop in enumerate(edges[1:])
    ]
    result = {"target": "demo", "step": 9, "tokens": 5, "loss": 6.0, "unigram_loss": 7.0, "buckets": entries}
    Console(width=80).print(*evaluation_tables(result))
    lines = capsys.readouterr().out.split("The same by position")[1].splitlines()
    assert lines[2].split() == ["position", "64", "128", "256", "512", "1k", "2k", "4k", "8k"]
    shown = [line.split()[1:] for line in lines if line.strip().startswith("<")]
    assert shown == [[f"{part['loss']:.3f}"] * (8 - number) for number, part in enumerate(parts)]


def evaluate_run(run: Path, overrides: list[str]) -> None:
    evaluate(RunDirectory(run).recipe(overrides), Console(quiet=True))


@pytest.mark.full
def test_a_run_is_evaluated_on_other_numbers_of_ranks(on_ranks, recipe_file, tmp_path):
    """Three ranks divide neither the batch of the run nor its slots."""
    settings = ["curriculum.mix=micro_batch", "evaluate.max_tokens_per_bucket=300", f"run_directory={tmp_path}"]
    on_ranks(1, train_one_step, recipe_file, settings)
    found = []
    for ranks, division in ((1, []), (3, []), (4, ["parallel.tokens_per_rank=128", "parallel.cp.topology=full_mesh"])):
        on_ranks(ranks, evaluate_run, tmp_path, division)
        found.append(json.loads((tmp_path / "evaluation.json").read_text()))
    for one in found:
        assert one["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)
        assert one["tokens"] == found[0]["tokens"]
        assert [(entry["bucket"], entry["cp"] > 1) for entry in one["buckets"]][-1] == (256, one is found[2])
        reason = "evaluate.max_tokens_per_bucket = 300: below one sequence; raise it to 512"
        assert one["left_out"] == [{"length": 512, "reason": reason}]


def train_one_step(recipe_file: Path, overrides: list[str]) -> None:
    train(load_recipe(recipe_file, overrides), Console(quiet=True), stop_after=1)


@pytest.mark.parametrize("tokens", [128, 512, 1024], ids="{} on a rank".format)
def test_any_number_of_ranks_divides_the_batch_of_an_evaluation(recipe_file, tokens):
    settings = [f"parallel.tokens_per_rank={tokens}", "curriculum.mix=micro_batch", "curriculum.slot_tokens=1024"]
    recipe = load_recipe(recipe_file, settings)
    for ranks in range(recipe.max_context_parallel, 30, recipe.max_context_parallel):
        assert recipe.to_evaluate(ranks).accumulation_steps(ranks) >= 1
        assert recipe.to_evaluate(ranks).lengths == recipe.lengths
