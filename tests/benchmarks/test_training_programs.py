"""The benchmarks that train models, at their smallest size: minutes, so they have a file of their own."""

from __future__ import annotations

import pytest
from helpers.benchmarks import check_smallest_size


@pytest.mark.slow
@pytest.mark.parametrize("script", ["phases", "related_training", "train_step", "variable_length"])
def test_smallest_size(script, tmp_path):
    check_smallest_size(script, tmp_path)
