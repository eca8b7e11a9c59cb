"""Retention: the checkpoints that are kept, and the removal of the others and of the leftovers of crashes."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from .format import DAMAGED, PARTIAL, REMOVED, checkpoint_step, complete_checkpoints


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint."""
    # Renamed first: a directory that has lost some of its files never counts as a complete checkpoint.
    aside = checkpoint.with_name(checkpoint.name + REMOVED)
    shutil.rmtree(aside, ignore_errors=True)  # left by a removal that a crash cut short
    checkpoint.rename(aside)
    shutil.rmtree(aside)


def put_checkpoint_aside(checkpoint: Path) -> None:
    """Rename a damaged checkpoint to `step-N.damaged`, replacing an earlier one of the same step."""
    aside = checkpoint.with_name(checkpoint.name + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)


def leftovers(directory: Path) -> dict[Path, int]:
    """Return the directories that interrupted saves and removals, or damage, have left behind, and the step of each."""
    paths = sorted(path for suffix in (PARTIAL, REMOVED, DAMAGED) for path in directory.glob(f"step-*{suffix}"))
    steps = {path: checkpoint_step(path.with_suffix("")) for path in paths}  # without .partial, .removed or .damaged
    return {path: step for path, step in steps.items() if step is not None}


def clear_leftovers(directory: Path) -> None:
    """Delete the leftovers of interrupted saves and removals. Damaged checkpoints stay."""
    for path in leftovers(directory):
        if path.suffix != DAMAGED:
            shutil.rmtree(path)


def steps_to_prune(steps: Iterable[int], keep_last: int, keep_every_steps: int) -> list[int]:
    """Return the steps whose checkpoints retention deletes.

    It keeps the last `keep_last` steps, every multiple of `keep_every_steps` (0: no multiples), and step 0, which is
    imported weights.
    """
    ordered = sorted(steps)
    older = ordered[: max(0, len(ordered) - keep_last)]
    return [step for step in older if step > 0 and (not keep_every_steps or step % keep_every_steps)]


def prune_checkpoints(directory: Path, keep_last: int, keep_every_steps: int) -> list[Path]:
    """Delete the checkpoints that retention does not keep; return their former paths."""
    by_step = {step: path for path in complete_checkpoints(directory) if (step := checkpoint_step(path)) is not None}
    gone = [by_step[step] for step in steps_to_prune(by_step, keep_last, keep_every_steps)]
    for checkpoint in gone:
        remove_checkpoint(checkpoint)
    return gone
