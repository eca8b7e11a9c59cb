"""lm-eval, where it is installed, reads an export and gives the likelihoods of the run that it comes from."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.plain_model import plain_losses
from helpers.small_checkpoint import read_whole
from longring.data.format.manifest import open_prepared
from longring.launch import cli
from longring.launch.config import load_recipe
from longring.launch.train import train
from rich.console import Console

TASK = """
task: of_this_test
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
TEXTS = (
    "def parse(self, args=None):",
    "import os as _os",
    "class Action(object):",
    "raise ValueError(",
)  # no space at an end, which lm-eval gives to the choice
CHOICES = ("\n        return args", " of the parser", "\n\nfrom gettext")


def trained(recipe_file: Path, overrides: list[str]) -> None:
    train(load_recipe(recipe_file, overrides), Console(quiet=True), stop_after=4)


@pytest.mark.slow
def test_lm_eval_on_an_export_gives_the_likelihoods_of_the_run(on_ranks, recipe_file, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not among LongRing's requirements: pip install lm_eval")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    from lm_eval import simple_evaluate  # type: ignore[import-not-found]
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    run, export = tmp_path / "run", tmp_path / "model"
    on_ranks(1, trained, recipe_file, [f"run_directory={run}"])
    assert cli.main(["export", str(run), str(export)]) == 0
    (tmp_path / "tasks").mkdir()
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": text, "choices": CHOICES}) + "\n" for text in TEXTS))
    (tmp_path / "tasks" / "of_this_test.yaml").write_text(TASK.format(file=lines))
    results = simple_evaluate(
        model="hf",
        model_args=f"pretrained={export},dtype=float32",
        tasks=["of_this_test"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        device="cpu",
        batch_size=1,
        bootstrap_iters=0,
    )
    print(json.dumps(results["results"]), file=sys.stderr)

    recipe = load_recipe(recipe_file)
    manifest = open_prepared(recipe.data.directory)
    saved = read_whole(run / "checkpoints" / "step-00000004")
    weights = {
        name.removesuffix("/weight"): torch.from_numpy(value).double()
        for name, value in saved.items()
        if name.endswith("/weight")
    }
    tokenizer, right = manifest.tokenizer().tokenizer, []
    for text, sample in zip(TEXTS, results["samples"]["of_this_test"], strict=True):
        found = [likelihood for likelihood, _ in sample["filtered_resps"]]
        expected = []
        for choice in CHOICES:
            tokens = tokenizer.encode(text + choice, add_special_tokens=False).ids
            given = len(tokenizer.encode(text, add_special_tokens=False).ids)
            row = torch.tensor([tokens])
            losses = plain_losses(weights, row, recipe.model, vocab_size=manifest.vocab_size)[0]
            expected.append(-float(losses[given - 1 :].sum()))
        assert found == pytest.approx(expected, rel=1e-4)
        right.append(int(np.argmax(expected)) == 0)
    assert results["results"]["of_this_test"]["acc,none"] == pytest.approx(np.mean(right))
