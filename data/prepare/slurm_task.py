"""One task of a job of `longring prepare --slurm`: `python -m longring.data.prepare.slurm_task FILE INDEX COUNT`."""

import sys
from pathlib import Path

from .slurm import run_task

if __name__ == "__main__":
    run_task(Path(sys.argv[1]), *map(int, sys.argv[2:]))
