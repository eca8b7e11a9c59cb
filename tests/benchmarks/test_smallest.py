"""Every benchmark runs at its smallest size and writes a record."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.benchmarks import BENCHMARKS, check_smallest_size, run
from helpers.lanes import by_lane
from lib.lab_network import unavailable

OWN_FILES = {
    *("copying", "corpus", "decomposition", "gpu_check", "gpu_node", "needles", "phases", "related_prefixes"),
    *("related_training", "soak", "start_memory", "train_step", "untie_the_knots", "variable_length"),
}
"""Benchmarks whose test is another file's, since a worker takes a whole file."""
SCRIPTS = sorted({path.stem for path in BENCHMARKS.glob("*.py")} - OWN_FILES)
ON_A_NETWORK = {"cp_lab_network", "cp_layouts_network", "gloo_links", "length_degrees_network"}
FAST = ["cp_layouts", "cp_paper", "cp_precision", "full_sizes", "gloo_links", "order", "tune_attention"]
"""Benchmarks of the quick and full lanes, a few seconds each; the others are slow."""


@pytest.mark.parametrize(
    "script", by_lane(SCRIPTS, quick=["cp_precision"], slow=[script for script in SCRIPTS if script not in FAST])
)
def test_smallest_size(script, tmp_path):
    if script in ON_A_NETWORK and (reason := unavailable()):
        pytest.skip(reason)
    if script == "tune_attention" and not torch.cuda.is_available():
        pytest.skip("block sizes are measured on a GPU: run this test on a machine with one")
    check_smallest_size(script, tmp_path)


def test_benchmarks_of_other_files_are_run_there():
    others = [file.read_text() for file in Path(__file__).parent.glob("test_*.py") if file != Path(__file__)]
    named = {name for text in others if "check_smallest_size(" in text for name in re.findall(r'"(\w+)"', text)}
    assert sorted(OWN_FILES - named) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message is that of a machine without a GPU")
def test_tuning_without_a_gpu_is_refused():
    done = run("tune_attention", "--smallest")
    assert done.returncode == 2
    assert "no GPU" in done.stderr


def test_wrong_options_are_refused():
    done = run("order", "--smallest", "--quick")
    assert done.returncode == 2
    assert "not allowed with" in done.stderr
