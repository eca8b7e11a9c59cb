"""Sections of the kernels: their tests, and benchmarks that exist as commands of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from . import ROOT
from .script import Row, Size
from .sections import limit_s

LANE = "not slow and not full"
"""Tests of `make test-quick`, one of every kind; `pytest tests/kernels` on the GPU runs them all."""
CPU_SELECTION = "test_merge or running or strides or written"
"""Tests of --quick on a CPU, where interpreted kernels are slow."""
MARGIN_S = 15
"""Time that a section keeps for its start and for the case under way at its deadline."""


def tests_rows(device: str, size: Size) -> Iterator[Row]:
    """Run pytest on the kernels' tests and yield its row."""
    files = ["tests/kernels"]
    # benchmarks/lib as a plugin: where LongRing is not installed, it lets pytest's processes import it.
    options = ["-q", "-p", "no:cacheprovider", "-p", "lib", "-m", LANE]
    notes = []
    if importlib.util.find_spec("hypothesis") is None:
        options += [word for name in ("mask", "varlen") for word in ("--ignore", f"tests/kernels/test_{name}.py")]
        notes.append("test_mask.py and test_varlen.py left out: no hypothesis here")
    if importlib.util.find_spec("liger_kernel") is None:
        notes.append("test_fused.py left out: no liger-kernel here")
    elif device == "cuda":
        files.append("tests/model/test_fused.py")
    if size == "smallest" or (size == "quick" and device == "cpu"):
        options += ["-k", "test_merge" if size == "smallest" else CPU_SELECTION]
        notes.append(f"only -k {options[-1]!r}")
    if device == "cuda" and importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(min(8, os.cpu_count() or 1))]  # a test's time is that of compiling its kernels
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TRITON_INTERPRET": "1"}
    if device == "cuda":
        del environment["TRITON_INTERPRET"]
    started = time.monotonic()
    # -P: the columns of the house must not be importable from the root under their bare names.
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", *options, *files],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    print(done.stdout)
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    note = "; ".join([*notes, *failed[:5]])
    summary = lines[-1].strip("= ") if lines else "no output"
    right = done.returncode == 0 and " passed" in summary  # tests that are all skipped show nothing
    yield {"tests": summary, "seconds": time.monotonic() - started, "right": right, "note": note}


def sizes_rows(device: str, size: Size) -> Iterator[Row]:
    """Yield the rows of benchmarks/full_sizes.py."""
    import full_sizes

    yield from full_sizes.all_rows(device, "triton" if device == "cuda" else "auto", size, deadline())


def family_rows(device: str, size: Size) -> Iterator[Row]:
    """Yield the rows of benchmarks/cp_virtual.py --quick; the section `tiles` has all."""
    import cp_virtual

    backend = "triton" if device == "cuda" else "torch_cpu"
    yield from cp_virtual.all_rows(device, backend, "smallest" if size == "smallest" else "quick", deadline())


def speed_rows(device: str, size: Size) -> Iterator[Row]:
    """Yield the rows of benchmarks/attention.py."""
    import attention

    from .cases import cases_here

    cases, _, backend = cases_here(size)
    yield from attention.all_rows(cases, device, backend, deadline())


def deadline() -> float:
    """Return the time (of `time.time`) after which no case of this section begins."""
    return time.time() + limit_s() - MARGIN_S
