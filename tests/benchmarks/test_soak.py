"""The soak at its smallest size. It takes a minute or two, so it has a file, and thereby a process, of its own."""

from __future__ import annotations

import pytest
from helpers.benchmarks import check_smallest_size


@pytest.mark.slow
def test_smallest_size(tmp_path):
    check_smallest_size("soak", tmp_path)
