"""What a run will do, worked out before any rank starts: what cannot work is said at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..data.batches import Batches
from ..data.curriculum import schedule
from ..data.manifest import MANIFEST_FILE, Manifest, open_prepared
from ..data.shards import sha256_of
from . import checkpoint
from .config import Recipe
from .run_directory import RunDirectory


@dataclass(frozen=True)
class Plan:
    """What a run will do, known before any rank talks to another."""

    manifest: Manifest
    batches: Batches
    run: RunDirectory
    data_hash: str
    """SHA-256 of the prepared data's manifest."""
    resume_from: Path | None
    done: int
    """Steps that the checkpoint to resume from has."""


def plan(recipe: Recipe, world_size: int) -> Plan:
    """Check recipe, world, data, run directory and checkpoint against each other.

    Raises ValueError at the first thing that does not fit. `longring train` calls it before it starts any rank, and
    every rank before it joins the others.
    """
    recipe.accumulation_steps(world_size)
    manifest = open_prepared(recipe.data.directory)
    manifest.check_made_from(recipe.data)
    data_hash = sha256_of(Path(recipe.data.directory) / MANIFEST_FILE)
    order = schedule(
        [bucket.tokens for bucket in manifest.splits["train"]],
        recipe.train.steps,
        recipe.curriculum.odds,
        recipe.curriculum.cycles,
        recipe.train.seed,
    )
    batches = Batches(recipe.data.directory, manifest, order, recipe.train.global_batch_tokens, recipe.train.seed)
    run = RunDirectory(recipe.run_directory)
    run.check(recipe)
    resume_from, done = checkpoint.latest(run.checkpoints), 0
    if resume_from is not None:
        state = checkpoint.read_state(resume_from)
        checkpoint.check(state, resume_from, world_size=world_size, data=data_hash)
        done = state.step
    return Plan(manifest, batches, run, data_hash, resume_from, done)
