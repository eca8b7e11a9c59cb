"""The experiments on learning at their smallest size, on one corpus of installed packages."""

from __future__ import annotations

import json

import pytest
from helpers.benchmarks import check_smallest_size


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    check_smallest_size("corpus", folder, "--directory", str(folder / "corpus"))
    return folder / "corpus"


@pytest.mark.slow
def test_every_file_is_in_one_split_or_left_out_for_a_reason(corpus):
    account = json.loads((corpus / "corpus.json").read_text())
    lines = {split: (corpus / f"{split}.jsonl").read_text().splitlines() for split in ("train", "held_out")}
    assert {row["split"]: row["files"] for row in account["rows"]} == {
        split: len(text) for split, text in lines.items()
    }
    assert account["files"] == sum(map(len, lines.values())) + sum(account["left_out"].values())
    packages = {split: {json.loads(line)["package"] for line in text} for split, text in lines.items()}
    assert packages["held_out"] == set(account["held_out_packages"])
    assert packages["train"] and packages["held_out"] and not packages["train"] & packages["held_out"]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["copying", "decomposition", "related_prefixes", "untie_the_knots"])
def test_smallest_size(script, corpus, tmp_path):
    check_smallest_size(script, tmp_path, "--corpus", str(corpus))
