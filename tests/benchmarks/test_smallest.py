"""Every benchmark runs at its smallest size and writes a record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.lanes import by_lane
from lib.lab_network import unavailable

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
ON_A_NETWORK = {"cp_lab_network", "gloo_links"}
FAST = ["cp_paper", "cp_precision", "full_sizes", "gloo_links", "order", "tune_attention"]
"""Benchmarks of the quick and full lanes, a few seconds each; the others are slow."""


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a benchmark in a process of its own, with compiled kernels where there is a GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "script", by_lane(SCRIPTS, quick=["cp_precision"], slow=[script for script in SCRIPTS if script not in FAST])
)
def test_smallest_size(script, tmp_path):
    if script in ON_A_NETWORK and (reason := unavailable()):
        pytest.skip(reason)
    if script == "tune_attention" and not torch.cuda.is_available():
        pytest.skip("block sizes are measured on a GPU: run this test on a machine with one")
    record = tmp_path / "record.json"
    pictures = {"cp_paper": ["--pictures", str(tmp_path)], "soak": ["--picture", str(tmp_path / "soak.png")]}
    done = run(script, "--smallest", "--json", str(record), *pictures.get(script, []))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(record.read_text())
    assert found["command"].startswith(f"python benchmarks/{script}.py --smallest")
    assert {"date", "device", "cores", "python"} < set(found)
    assert any(isinstance(value, list) and value for value in found.values()), "a record has rows"
    if script in pictures:
        assert list(tmp_path.glob("*.png"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message is that of a machine without a GPU")
def test_tuning_without_a_gpu_is_refused():
    done = run("tune_attention", "--smallest")
    assert done.returncode == 2
    assert "no GPU" in done.stderr


def test_wrong_options_are_refused():
    done = run("order", "--smallest", "--quick")
    assert done.returncode == 2
    assert "not allowed with" in done.stderr
