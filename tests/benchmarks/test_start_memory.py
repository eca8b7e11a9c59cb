"""A rank of several holds its part of the model alone while the model is made, under ZeRO 3."""

from __future__ import annotations

import json

import pytest
from helpers.benchmarks import check_smallest_size


@pytest.mark.slow
def test_a_rank_holds_its_part_and_one_matrix(tmp_path):
    check_smallest_size("start_memory", tmp_path)
    alone, shared = json.loads((tmp_path / "record.json").read_text())["rows"]
    part, matrix = alone["peak_mb"] / shared["ranks"], 6 * shared["largest_matrix"] / 2**20  # drawn in fp32, then bf16
    assert shared["peak_mb"] < part + matrix + 16, "the whole weights are 64 MB in bf16 and 128 in fp32"
