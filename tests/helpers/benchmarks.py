"""Benchmarks in processes of their own, at their smallest size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

WITH_PICTURE = ("copying", "decomposition", "needles", "related_prefixes", "soak", "untie_the_knots")
"""Benchmarks with the option --picture."""


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a benchmark in a process of its own, with compiled kernels where there is a GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def check_smallest_size(script: str, tmp_path: Path, *arguments: str) -> None:
    """Run a benchmark at its smallest size, with further arguments; check its record and its pictures."""
    record = tmp_path / "record.json"
    drawn = ["--pictures", str(tmp_path)]
    picture = ["--picture", str(tmp_path / "picture.png")]
    pictures = {"cp_paper": drawn, "published_mixes": drawn, **dict.fromkeys(WITH_PICTURE, picture)}
    files = {**pictures, "gpu_node": ["--directory", str(tmp_path)]}
    done = run(script, "--smallest", "--json", str(record), *files.get(script, []), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(record.read_text())
    assert found["command"].startswith(f"python benchmarks/{script}.py --smallest")
    assert {"date", "device", "cores", "python"} < set(found)
    assert any(isinstance(value, list) and value for value in found.values()), "a record has rows"
    if script in pictures:
        assert list(tmp_path.glob("*.png"))
