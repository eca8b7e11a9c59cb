"""Runs on data that is extended: one that has begun before goes on, and another one trains and resumes on all of it."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from helpers.faulty import BATCH_TOKENS, Fault, Run
from helpers.files import tree
from longring.data.prepare.prepare import prepare
from longring.launch.config import load_recipe
from rich.console import Console


@pytest.mark.full
def test_a_run_goes_on_beside_one_on_the_extended_data(recipe_file, whole, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(recipe_file.parent / "data", data)
    begun = Run(recipe_file, tmp_path / "begun", [f"data.directory={data}"])
    assert begun.start(*(Fault(rank, "SIGKILL", step=5, operation="forward") for rank in (0, 1))) == [-9, -9], (
        begun.said
    )
    assert json.loads((begun.path / "trained.json").read_text())["step"] == 3, "that of the last checkpoint"
    old = tree(data)

    lines = (recipe_file.parent / "documents.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "books.jsonl").write_text("".join(line.replace("the", "thy") for line in lines[::2]))
    files = {"documents": recipe_file.parent / "documents.jsonl", "books": tmp_path / "books.jsonl"}
    sources = ", ".join(f"{name}={{kind='json', path='{file}'}}" for name, file in files.items())
    extended = ["data.source={}", f"data.sources={{{sources}}}", f"data.directory={data}"]
    manifest = prepare(load_recipe(recipe_file, extended).data, Console(quiet=True), workers=1)
    kept = tmp_path / str(manifest.extends)
    assert tree(kept) == old

    assert begun.start() == [2, 2]
    found = re.search(r"has been extended by books; set it to (\S+), the data before, or add", begun.said)
    assert found is not None, begun.said
    assert begun.start(overrides=[f"data.directory={found[1]}"]) == [0, 0], begun.said
    assert begun.metrics == whole.metrics

    after = Run(recipe_file, tmp_path / "after", [*extended, "curriculum.shares.books=0.5", "train.steps=12"])
    assert after.start(stop_after=2) == [0, 0], after.said
    assert after.start() == [0, 0], after.said
    ledger = json.loads((after.path / "trained.json").read_text())
    tokens = {"documents": 0, "books": 0}
    for cell in ledger["cells"]:
        tokens[cell["source"]] += cell["tokens"]
    assert ledger["step"] == 12
    # Each bucket gives whole sequences to its sources in turn: half of the tokens but for one sequence of each.
    assert abs(tokens["books"] - 12 * BATCH_TOKENS / 2) <= 64 + 128 + 256 + 512
    assert tree(kept) == old
    assert {name: content for name, content in tree(data).items() if name in old and name.endswith(".tar")} == {
        name: content for name, content in old.items() if name.endswith(".tar")
    }
