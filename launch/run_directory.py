"""The run directory: its files, its lock, and its records."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..data.files import write_text
from ..data.lock import HeldError, held
from ..parallel.world import World
from .config import Recipe, load_recipe
from .records import append_record, put_bad_lines_aside, read_records
from .settings import apply_overrides, from_tree, to_tree

log = logging.getLogger(__name__)

_LOCK_WAIT_S = 30
_REMOVE_RECIPE = "remove it, and the next `longring train` with the same recipe writes it again"


class RunDirectory:
    """The paths within a run directory, whose tree is in docs/run-directory.md, and the records in them."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe_file = self.path / "recipe.json"
        self.tokenizer_file = self.path / "tokenizer.json"
        self.published = self.path / "published"  # files beside the weights of an imported model
        self.lock_file = self.path / "lock"
        self.starts_file = self.path / "starts.jsonl"
        self.logs = self.path / "logs"
        self.job_script = self.path / "job.sbatch"
        self.evaluation_script = self.path / "evaluation.sbatch"
        self.requeues_file = self.path / "requeues.jsonl"
        self.events_file = self.path / "events.jsonl"
        self.metrics_file = self.path / "metrics.jsonl"
        self.saves_file = self.path / "saves.jsonl"
        self.renewals_file = self.path / "renewals.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.grids_file = self.path / "grids.json"
        self.attention_file = self.path / "attention.json"
        self.checkpoints = self.path / "checkpoints"
        self.trained_file = self.path / "trained.json"
        self.evaluation_file = self.path / "evaluation.json"
        self.evaluations_file = self.path / "evaluations.jsonl"
        self.picture_file = self.path / "loss.png"
        self.report_file = self.path / "report.html"

    def log_file(self, rank: int) -> Path:
        """Return the log file of a rank."""
        return self.logs / f"rank-{rank:05d}.log"

    def recipe(self, overrides: Sequence[str] = ()) -> Recipe:
        """Return the resolved recipe of the run with overrides of settings of `evaluate` and `parallel`.

        Raises ValueError if there is no run, if its recipe.json is damaged, or for any other override.
        """
        if not self.recipe_file.is_file():
            raise ValueError(
                f"{self.path}: not a run directory, since it has no {self.recipe_file.name}; name the directory of a "
                "run that `longring train` has started"
            )
        for override in overrides:
            if not override.startswith(("evaluate.", "parallel.")):
                raise ValueError(
                    f"override {override!r}: only evaluate.* and parallel.* may differ from the run; leave it out"
                )
        # The directory may have been moved since it was written.
        tree = self._saved() | {"run_directory": str(self.path)}
        overridden = apply_overrides(tree, overrides)
        return from_tree(Recipe, tree, source=str(self.recipe_file), overridden=overridden)

    def check_is_run(self) -> None:
        """Raise ValueError unless this directory is new, empty, or holds a run."""
        is_run = self.recipe_file.exists() or self.logs.is_dir() or self.checkpoints.is_dir()
        if not is_run and self.path.is_dir() and any(self.path.iterdir()):
            raise ValueError(f"run_directory = {self.path}: holds other files; name a new directory")

    def run_id(self) -> str | None:
        """Return the id of the run that this directory holds, or None before its first start."""
        ids = [start["run"] for start in read_records(self.starts_file) if isinstance(start.get("run"), str)]
        return ids[-1] if ids else None

    def _saved(self) -> dict[str, Any]:
        """Return the resolved recipe as nested tables. Raises ValueError if the file is damaged."""
        try:
            tree = json.loads(self.recipe_file.read_text())
        except ValueError as error:
            raise ValueError(f"{self.recipe_file}: damaged: {error}; {_REMOVE_RECIPE}") from error
        if not isinstance(tree, dict):
            raise ValueError(f"{self.recipe_file}: damaged: it holds no table; {_REMOVE_RECIPE}")
        return tree

    def create(self, recipe: Recipe) -> None:
        """Make the directory and write the resolved recipe into it."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.recipe_file, json.dumps(to_tree(recipe), indent=2) + "\n")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock of this directory, so that no other process trains in it at the same time.

        The system releases the lock when this process ends, for any reason. Raises ValueError if another process still
        holds it after 30 s, the time that a stopping run may take to end.
        """
        try:
            # A process that has been told to stop holds the lock until its last save is done.
            with held(self.lock_file, wait_s=_LOCK_WAIT_S):
                yield
        except HeldError as error:
            raise ValueError(
                f"run_directory = {self.path}: in use by {error}; end it, or name another run_directory"
            ) from None

    def record_start(self, facts: Mapping[str, Any]) -> None:
        """Append one line to starts.jsonl: time, host, command, git commit and other facts of it; no secrets."""
        start = {
            "host": platform.node(),
            "command": sys.argv,
            "git": _git_state(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            **facts,
        }
        append_record(self.starts_file, start)

    def record_save(self, step: int) -> None:
        """Append one line to saves.jsonl, from which a later start knows that the run has had a checkpoint."""
        self._append(self.saves_file, {"step": step})

    def record_evaluation(self, result: dict[str, Any]) -> None:
        """Write evaluation.json, and append the same to evaluations.jsonl. Raises OSError if one cannot be written."""
        write_text(self.evaluation_file, json.dumps(result, indent=2) + "\n")
        append_record(self.evaluations_file, result)

    def evaluations(self) -> list[dict[str, Any]]:
        """Return the evaluations of the run by step, ascending; the last of each step."""
        found: list[Any] = []
        with suppress(OSError, ValueError):  # none yet, or damaged
            found.append(json.loads(self.evaluation_file.read_text()))
        found += read_records(self.evaluations_file)
        whole = [e for e in found if isinstance(e, dict) and isinstance(e.get("step"), int) and e.get("buckets")]
        # The sort is stable: of one step the last record stays, and evaluation.json only if no record has its step.
        return list({entry["step"]: entry for entry in sorted(whole, key=lambda entry: entry["step"])}.values())

    def record_event(self, event: str, step: int, message: str) -> None:
        """Append one line to events.jsonl; any rank may. A record that cannot be written is only logged."""
        line = {"event": event, "step": step, "rank": World.from_environment().rank, "message": message}
        self._append(self.events_file, line)

    def _append(self, file: Path, record: dict[str, Any]) -> None:
        try:
            append_record(file, record)
        except OSError as error:  # a full disk may be the very event: it must not hide it
            log.error("no record of %s in %s: %s", record, file, error)

    def put_bad_records_aside(self) -> list[str]:
        """Move the lines of all records that hold none into files of their own; return a sentence for each file."""
        files = (
            *(self.starts_file, self.saves_file, self.events_file, self.metrics_file, self.requeues_file),
            *(self.evaluations_file, self.renewals_file),
        )
        return [moved for file in files if (moved := put_bad_lines_aside(file)) is not None]

    def check_writable(self) -> None:
        """Write into logs/ and checkpoints/ and remove it. Raises OSError that names the directory that refuses."""
        for directory in (self.logs, self.checkpoints):
            try:
                directory.mkdir(parents=True, exist_ok=True)
                probe = directory / f".probe-{platform.node()}-{os.getpid()}"
                write_text(probe, "written")
                probe.unlink()
            except OSError as error:
                reason = error.strerror or error
                raise OSError(
                    f"run_directory = {self.path}: {directory} cannot be written: {reason}; allow this user to write "
                    "there, or make room"
                ) from error


def find_run(target: str, overrides: Sequence[str] = ()) -> tuple[RunDirectory, list[str]]:
    """Return the run directory `target`, or that of the recipe file `target`, and the overrides for the run's recipe.

    With a recipe file an override of `run_directory` names another run. Raises ValueError if the recipe is wrong.
    """
    if not Path(target).is_file():
        return RunDirectory(target), list(overrides)
    named = [override for override in overrides if override.partition("=")[0].strip() == "run_directory"]
    rest = [override for override in overrides if override not in named]
    return RunDirectory(load_recipe(target, named).run_directory), rest


def _git_state() -> dict[str, Any] | None:
    """Return the commit of the running code and whether it has uncommitted changes; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
