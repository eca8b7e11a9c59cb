"""Every kernel compiles for GPUs that this machine lacks; those for Hopper spill nothing and read whole vectors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPORT = Path(__file__).parents[2] / "benchmarks" / "compile_report.py"


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--quick"], ["--only", "sm_90"]], ids=" ".join)
def test_kernels_compile(arguments, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(REPORT), *arguments, "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    kernels = {row["kernel"] for row in rows}
    assert kernels == {"forward", "forward (running)", "backward_dkdv", "backward_dq", "delta", "merge"}
    assert not [row for row in rows if row["architecture"] == "sm_90" and (row["spill_bytes"] or row["b16_loads"])]
    if "--quick" in arguments:
        assert {row["architecture"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    else:
        assert len(rows) == 2 * 7 * len(kernels)  # bf16 and fp32, seven head dims
