"""A small model learns to copy: benchmarks/needles.py at its smallest size, in a process of its own for a minute."""

from __future__ import annotations

import json

import pytest
from helpers.benchmarks import check_smallest_size


@pytest.mark.slow
def test_a_small_model_learns_to_copy(tmp_path):
    check_smallest_size("needles", tmp_path)
    gains = {
        (target["step"], entry["length"], entry["cp"]): entry["gain"]
        for target in json.loads((tmp_path / "record.json").read_text())["rows"]
        for entry in target["tasks"]
        if entry["task"] == "copy_random"
    }
    assert gains[30, 128, 2] < 1 < gains[150, 128, 2]
