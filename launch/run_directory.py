"""What a run leaves on disk, and the check that a directory belongs to the recipe at hand."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .config import Recipe, apply_overrides, from_tree

# Run and data may be moved (a checkpoint knows its data by hash), and attention divided in another way; every other key
# decides what the run computes.
_FREE_KEYS = (
    "run_directory",
    "data.directory",
    "order.directory",
    "order.work_directory",
    "evaluate.",
    "loader.workers",
    "loader.prefetch_batches",
    "loader.cache_",
    "parallel.cp.",
    "train.ranks_per_node",
    "train.checkpoint_every_steps",
)


class RunDirectory:
    """Paths within a run directory; the tree is drawn in README.md."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe_file = self.path / "recipe.json"
        self.starts_file = self.path / "starts.jsonl"
        self.metrics_file = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.schedules_file = self.path / "schedules.json"
        self.checkpoints = self.path / "checkpoints"
        self.evaluation_file = self.path / "evaluation.json"
        self.picture_file = self.path / "loss.png"

    def log_file(self, rank: int) -> Path:
        """Where `rank` logs."""
        return self.path / "logs" / f"rank-{rank:05d}.log"

    def recipe(self, overrides: Sequence[str] = ()) -> Recipe:
        """The resolved recipe of the run, with other `evaluate` settings. ValueError when there is no run here."""
        if not self.recipe_file.is_file():
            raise ValueError(f"{self.path} is no run directory: it has no {self.recipe_file.name}")
        for override in overrides:
            if not override.startswith("evaluate."):
                raise ValueError(f"override {override!r}: of a finished run only evaluate.* can be set")
        # The directory may have been moved since.
        tree = json.loads(self.recipe_file.read_text()) | {"run_directory": str(self.path)}
        apply_overrides(tree, overrides)
        return from_tree(Recipe, tree, source=str(self.recipe_file))

    def check(self, recipe: Recipe) -> None:
        """Raise ValueError unless this directory is new or holds a run of the same recipe."""
        if not self.recipe_file.exists():
            if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / "logs").is_dir():
                raise ValueError(f"run_directory = {self.path} holds other files; name a new directory")
            return
        theirs, ours = _flat(json.loads(self.recipe_file.read_text())), _flat(json.loads(json.dumps(asdict(recipe))))
        for key in sorted(theirs.keys() | ours.keys()):
            if theirs.get(key) != ours.get(key) and not key.startswith(_FREE_KEYS):
                raise ValueError(
                    f"run directory {self.path} is of another recipe: {key} was {theirs.get(key)!r} there and is "
                    f"{ours.get(key)!r} now; name another run_directory, or go back to the old value to resume"
                )

    def create(self, recipe: Recipe) -> None:
        """Make the directory and write the resolved recipe, whole or not at all."""
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.recipe_file.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(recipe), indent=2) + "\n")
        partial.rename(self.recipe_file)

    def record_start(self, world_size: int, from_step: int) -> None:
        """Append one line that says what started: when, where, with which code and versions."""
        start = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "from_step": from_step,
            "world_size": world_size,
            "host": platform.node(),
            "command": sys.argv,
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("longring", "torch", "deepspeed", "megatron-core")},
            "git": _git_state(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
        }
        with self.starts_file.open("a") as file:
            file.write(json.dumps(start) + "\n")


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
