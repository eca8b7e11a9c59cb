"""The checks of a machine's GPUs, over gloo at their smallest size: minutes, so they have a file of their own."""

from __future__ import annotations

import pytest
from helpers.benchmarks import check_smallest_size


@pytest.mark.slow
@pytest.mark.parametrize("script", ["gpu_check", "gpu_node"])
def test_smallest_size(script, tmp_path):
    check_smallest_size(script, tmp_path)
