"""What a run leaves on disk, and the check that a directory belongs to the recipe at hand."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..data.files import write_text
from .config import Recipe
from .settings import apply_overrides, from_tree

log = logging.getLogger(__name__)

_LOCK_WAIT_S = 30
# Run and data may be moved (a checkpoint knows its data by hash), and the work be divided otherwise: the same batches
# and weights, losses equal to rounding. Every other key decides what the run computes.
_FREE_KEYS = (
    "run_directory",
    "data.directory",
    "order.directory",
    "order.work_directory",
    "evaluate.",
    "faults.",
    "parallel.",
    "slurm.",
    "loader.workers",
    "loader.prefetch_batches",
    "loader.cache_",
    "train.ranks_per_node",
    "train.checkpoint_every_steps",
    "train.keep_checkpoint",
    "train.deterministic",
)


class RunDirectory:
    """Paths within a run directory; the tree is drawn in README.md."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe_file = self.path / "recipe.json"
        self.lock_file = self.path / "lock"
        self.starts_file = self.path / "starts.jsonl"
        self.logs = self.path / "logs"
        self.job_script = self.path / "job.sbatch"
        self.requeues_file = self.path / "requeues.jsonl"
        self.events_file = self.path / "events.jsonl"
        self.metrics_file = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.grids_file = self.path / "grids.json"
        self.checkpoints = self.path / "checkpoints"
        self.evaluation_file = self.path / "evaluation.json"
        self.picture_file = self.path / "loss.png"

    def log_file(self, rank: int) -> Path:
        """Where `rank` logs."""
        return self.logs / f"rank-{rank:05d}.log"

    def recipe(self, overrides: Sequence[str] = ()) -> Recipe:
        """The resolved recipe of the run, with other `evaluate` settings. ValueError when there is no run here."""
        if not self.recipe_file.is_file():
            raise ValueError(f"{self.path} is no run directory: it has no {self.recipe_file.name}")
        for override in overrides:
            if not override.startswith("evaluate."):
                raise ValueError(f"override {override!r}: of a finished run only evaluate.* can be set")
        # The directory may have been moved since.
        tree = self._saved() | {"run_directory": str(self.path)}
        apply_overrides(tree, overrides)
        return from_tree(Recipe, tree, source=str(self.recipe_file))

    def check(self, recipe: Recipe) -> None:
        """Raise ValueError unless this directory is new or holds a run of the same recipe."""
        if not self.recipe_file.exists():
            if self.path.is_dir() and any(self.path.iterdir()) and not self.logs.is_dir():
                raise ValueError(f"run_directory = {self.path} holds other files; name a new directory")
            return
        theirs, ours = _flat(self._saved()), _flat(json.loads(json.dumps(asdict(recipe))))
        for key in sorted(theirs.keys() | ours.keys()):
            if theirs.get(key) != ours.get(key) and not key.startswith(_FREE_KEYS):
                raise ValueError(
                    f"run directory {self.path} is of another recipe: {key} was {theirs.get(key)!r} there and is "
                    f"{ours.get(key)!r} now; name another run_directory, or go back to the old value to resume"
                )

    def _saved(self) -> dict[str, Any]:
        """The resolved recipe as plain tables. Raises ValueError that names the file when that is damaged."""
        try:
            tree = json.loads(self.recipe_file.read_text())
        except ValueError as error:
            raise ValueError(f"{self.recipe_file} is damaged: {error}") from error
        if not isinstance(tree, dict):
            raise ValueError(f"{self.recipe_file} is damaged: it holds no table")
        return tree

    def create(self, recipe: Recipe) -> None:
        """Make the directory and write the resolved recipe, whole or not at all."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.recipe_file, json.dumps(asdict(recipe), indent=2) + "\n")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from training here: two of them would overwrite each other's checkpoints.

        The system gives the lock back when the process ends, however it does. Raises ValueError when another holds it,
        for longer than one that has been told to end would.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self.lock_file.open("a+") as file:
            for left_s in range(_LOCK_WAIT_S, -1, -1):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not left_s:
                        file.seek(0)
                        raise ValueError(
                            f"run directory {self.path} is being trained in by {file.read().strip() or 'another'}: "
                            "end that first, or name another run_directory"
                        ) from None
                    time.sleep(1)
                except OSError as error:  # a file system without locks
                    log.warning("%s cannot be locked: %s", self.lock_file, error)
                    break
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()} since {_now()}\n")
            file.flush()
            yield

    def record_start(self, world_size: int, from_step: int, environment: dict[str, Any]) -> None:
        """Append one line that says what started: when, where, with which code, versions and environment."""
        start = {
            "time": _now(),
            "from_step": from_step,
            "world_size": world_size,
            "host": platform.node(),
            "command": sys.argv,
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("longring", "torch", "deepspeed", "megatron-core")},
            "git": _git_state(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "environment": environment,
        }
        with self.starts_file.open("a") as file:
            file.write(json.dumps(start) + "\n")

    def record_event(self, event: str, step: int, message: str) -> None:
        """Append one line of what went wrong or out of the ordinary; any rank may."""
        line = {"time": _now(), "event": event, "step": step, "rank": int(os.environ["RANK"]), "message": message}
        try:
            with self.events_file.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # a full disk is one of the events: it must not hide what is being told
            log.error("no record of %s: %s", line, error)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _git_state() -> dict[str, Any] | None:
    """Commit of the code that runs, and whether it has changes on top; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
