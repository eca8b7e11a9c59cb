"""The `longring` commands that a user would type, run by a benchmark on one thread a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

from rich.console import Console

from .script import Row, seconds_of


def longring(folder: Path, *words: str) -> Row:
    """Run a command in a directory and return it with its seconds and its CPU seconds, those of its ranks included.

    Raises CalledProcessError if it fails.
    """
    line = f"longring {' '.join(words)}"
    Console(stderr=True).print(line, highlight=False, soft_wrap=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "longring.launch.cli", *words]
    before = _cpu_seconds_of_children()
    seconds = seconds_of(lambda: subprocess.run(command, cwd=folder, env=environment, check=True, stdout=sys.stderr))
    return {"command": line, "seconds": round(seconds, 1), "cpu_seconds": round(_cpu_seconds_of_children() - before, 1)}


def _cpu_seconds_of_children() -> float:
    used = getrusage(RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
