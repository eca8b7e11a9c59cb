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
    tiled = ("forward", "backward_dkdv", "backward_dq")
    gluon = tuple(f"gluon_{name}" for name in tiled)
    assert kernels == {*tiled, *gluon, *(f"{name} (running)" for name in tiled + gluon), "delta", "merge"}
    hopper = [row for row in rows if row["architecture"] == "sm_90"]
    assert not [row for row in hopper if row["b16_loads"] or (row["spill_bytes"] and "loops" not in row)]
    # Forward, and the two kernels of the backward: 2, 4 and 3 products of a block of queries with one of keys. Each
    # group of a Gluon kernel has a loop with masks and one without.
    for row in hopper:
        if row["kernel"] in tiled + gluon and row["configuration"].startswith("bf16 d128"):
            block_m, block_n = map(int, row["configuration"].split()[-1].split(",")[:2])
            flops = 2 * 128 * block_m * block_n * (2, 4, 3)[(tiled + gluon).index(row["kernel"]) % 3]
            groups = {"gluon_forward": 3, "gluon_backward_dkdv": 2, "gluon_backward_dq": 2}.get(row["kernel"], 1)
            expected = [flops / groups / 4096] * 2 * groups
            assert [loop["clocks"]["products"] for loop in row["loops"]] == expected
            assert all(0 < loop["share"] <= loop["bound"] <= 1 for loop in row["loops"])
            assert row["kernel"] in tiled or not any(loop["spill_bytes"] for loop in row["loops"])
    if "--quick" in arguments:
        assert {row["architecture"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    else:
        # bf16 and fp32, seven head dims; in fp32 gradients that are written are those that are added. Gluon's have two.
        assert len(rows) == 7 * (2 * (len(kernels) - 6) - 2) + 2 * 6
