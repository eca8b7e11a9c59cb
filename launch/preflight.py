"""Checks before any rank starts: recipe, world, data, run directory and checkpoint fit each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..data.files import sha256_of
from ..data.format.manifest import MANIFEST_FILE, Manifest, open_prepared
from ..data.read.batch_order import BatchOrder
from ..data.read.loader import training_order
from .checkpoint.format import DAMAGED, check_trained_on, complete_checkpoints, last_good_checkpoint
from .config import Recipe
from .grids.choice import check_named_grids
from .records import read_records
from .run_directory import RunDirectory


@dataclass(frozen=True)
class Preflight:
    """The data that a start will read and the run that it continues, known before any rank talks to another."""

    manifest: Manifest
    """Manifest of the training data."""
    order: BatchOrder
    """Sequences of every step."""
    run: RunDirectory
    """Directory of the run, which may not exist yet."""
    data_hash: str
    """SHA-256 of the prepared data's manifest."""
    resume_from: Path | None
    """Last checkpoint that seems whole; its hashes are checked when it is loaded."""
    steps_done: int
    """Number of steps that this checkpoint has done; 0 without a checkpoint."""


def preflight(recipe: Recipe, world_size: int, *, check_shards: bool = True) -> Preflight:
    """Check recipe, world, data, run directory and checkpoint against each other.

    Raises ValueError for the first that does not fit, and OSError if a file cannot be read. `longring train` calls it
    before it starts any rank, and every rank calls it before it joins the others. With `check_shards` the size of every
    shard is checked, a request each on a shared file system, so one rank does it for all.
    """
    # The recipe alone comes first: these checks read no file. Then come the data, the run and its last checkpoint.
    recipe.accumulation_steps(world_size)
    check_named_grids(recipe)
    manifest = open_prepared(recipe.training_directory, recipe.loader, check_shards=check_shards)
    manifest.check_made_from(recipe.data, recipe.order)
    data_hash = sha256_of(manifest.store.path(MANIFEST_FILE))
    order = training_order(
        manifest,
        recipe.curriculum,
        recipe.loader,
        steps=recipe.train.steps,
        global_batch_tokens=recipe.train.global_batch_tokens,
        seed=recipe.train.seed,
    )
    run = RunDirectory(recipe.run_directory)
    run.check(recipe)
    resume_from, steps_done = None, 0
    if (found := last_good_checkpoint(run.checkpoints)) is not None:
        resume_from, saved = found
        check_trained_on(saved, resume_from, data_hash)
        steps_done = saved.state.step
    else:
        check_nothing_was_saved(run)
    return Preflight(manifest, order, run, data_hash, resume_from, steps_done)


def check_nothing_was_saved(run: RunDirectory) -> None:
    """Raise ValueError if a run without a complete checkpoint has had one: a start would begin again from step 0.

    A run that was killed before its first checkpoint passes, whatever its metrics say: nothing saved was lost.
    """
    if complete_checkpoints(run.checkpoints):
        return  # damaged ones, which are put aside with a word when the run resumes
    found = [save.get("step") for save in read_records(run.saves_file)]
    found += [start.get("from_step") for start in read_records(run.starts_file)]
    last = max((step for step in found if isinstance(step, int)), default=0)
    shown = [f"step {last} was saved"] if last else []
    shown += [f"{path.name} was put aside" for path in sorted(run.checkpoints.glob(f"step-*{DAMAGED}"))]
    if shown:
        raise ValueError(
            f"run_directory = {run.path}: {', '.join(shown)}, and {run.checkpoints} has no complete checkpoint; mount "
            "its disk or bring a copy back, or name another run_directory to start from the first step"
        )
