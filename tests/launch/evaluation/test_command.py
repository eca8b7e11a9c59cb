"""`longring evaluate --tasks`: results, and tables that are whole at 80 columns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from longring.launch.config import load_recipe
from longring.launch.evaluate import evaluate
from longring.launch.report.evaluation_tables import long_context_tables
from longring.launch.train import train
from rich.console import Console

SETTINGS = [
    *('evaluate.tasks=["needle_single","variables","copy","prefix"]', "evaluate.samples=9"),
    *("evaluate.context_sequences=3", "evaluate.short_tokens=128", "evaluate.max_tokens_per_bucket=2048"),
]


def train_and_evaluate(recipe_file: Path, overrides: list[str]) -> None:
    train(load_recipe(recipe_file, overrides), Console(quiet=True), stop_after=1)
    evaluate(load_recipe(recipe_file, [*overrides, *SETTINGS]), Console(quiet=True))
    with pytest.raises(ValueError, match="evaluate.tasks = haystack: there is no such task; name some of .*needle"):
        evaluate(load_recipe(recipe_file, [*overrides, 'evaluate.tasks=["haystack"]']), Console(quiet=True))


@pytest.mark.full
def test_tasks_and_context_are_in_the_evaluation_and_in_whole_tables(on_ranks, recipe_file, tmp_path, capsys):
    overrides = [f"run_directory={tmp_path}", "parallel.tokens_per_rank=256", "parallel.cp.topology=full_mesh"]
    on_ranks(2, train_and_evaluate, recipe_file, overrides)
    result = json.loads((tmp_path / "evaluation.json").read_text())
    scored = {(entry["task"], entry["length"]) for entry in result["tasks"]}
    assert {("needle_single_1", 512), ("variables", 512), ("copy_random", 64), ("prefix", 512)} <= scored | {
        (entry["task"], entry["length"]) for entry in result["left_out"]
    }
    assert ("copy_text", 64) in scored and ("needle_single_1", 512) in scored
    told = ("; take a longer bucket, or give a greater length", "; prepare more of them, or leave out the task prefix")
    for entry in result["left_out"]:
        if entry["task"] == "long_ppl":
            assert entry["reason"] == "evaluate.short_tokens = 128: LongPPL takes longer sequences; lower it"
        else:
            assert entry["reason"].endswith(told)
    assert [entry["length"] for entry in result["context"]] == [64, 128, 256, 512]
    assert [entry["length"] for entry in result["long_ppl"]] == [256, 512]
    assert [entry["length"] for entry in result["left_out"] if entry["task"] == "long_ppl"] == [64, 128]
    Console(width=80).print(*long_context_tables(result))
    printed = capsys.readouterr().out
    assert "…" not in printed and max(map(len, printed.splitlines())) <= 80
    for entry in result["tasks"]:
        assert entry["task"] in printed
    for entry in result["context"]:
        assert f"{entry['losses'][3]:.3f}" in printed
