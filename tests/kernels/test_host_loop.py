"""Compiled loops, on machines that keep them and on machines that cannot."""

from __future__ import annotations

import re
from importlib import reload
from pathlib import Path

import numpy as np
import pytest
from longring.data.order import duplicates, path
from longring.kernels.host_loop import host_loop
from numba.core.caching import CacheImpl, FunctionCache

ROOT = Path(__file__).parents[2]


def add(numbers, more):
    """Add `more` to each number in place, and return the sum."""
    total = 0.0
    for at in range(len(numbers)):
        numbers[at] += more
        total += numbers[at]
    return total


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path: Path) -> Path:
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path))
    return tmp_path


def no_room(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("machine", ["keeps", "no directory", "full disk"])
def test_a_loop_runs_once_and_is_kept_where_it_can_be(monkeypatch, empty_cache, machine):
    if machine == "no directory":
        monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    if machine == "full disk":
        monkeypatch.setattr(FunctionCache, "save_overload", no_room)
    numbers = np.array([1.0, 2.0])
    assert host_loop(add)(numbers, 0.5) == 4.0
    assert numbers.tolist() == [1.5, 2.5]  # not twice
    assert bool(list(empty_cache.rglob("*.nbc"))) == (machine == "keeps")


@pytest.mark.full
def test_the_order_of_documents_is_made_where_nothing_can_be_kept(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(CacheImpl, "_locator_classes", [])
        for module in (path, duplicates):
            reload(module)
        documents, _ = path.document_order(np.array([[2], [2], [1]]), np.array([[0.5], [0.9], [0.9]], np.float32))
        dropped = duplicates.choose_dropped(np.array([[1, 0], [2, 1]], np.uint32), 3)
    for module in (path, duplicates):
        reload(module)
    assert documents.tolist() == [0, 2, 1]
    assert dropped.tolist() == [[1, 0]]


def test_every_loop_is_compiled_by_this_module():
    """A loop that numba compiles by itself fails on a machine on which nothing can be kept."""
    sources = [
        file for column in ("data", "kernels", "launch", "model", "parallel") for file in (ROOT / column).rglob("*.py")
    ]
    users = {
        file.relative_to(ROOT) for file in sources if re.search(r"^\s*(from|import) numba\b", file.read_text(), re.M)
    }
    assert users == {Path("kernels/host_loop.py")}
