"""Checks before the ranks join: recipe, world, data, run directory and checkpoint fit each other, on all ranks."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import Store

from ..data.files import read_patiently, sha256_of
from ..data.format.manifest import MANIFEST_FILE, Manifest, open_prepared
from ..data.read.batch_order import BatchOrder
from ..data.read.mix import training_order
from ..data.read.renewal import Renewal
from ..parallel.world import World
from .agreement import LAST_SAVED, agree
from .checkpoint.format import (
    DAMAGED,
    CheckpointManifest,
    check_trained_on,
    complete_checkpoints,
    last_good_checkpoint,
)
from .checkpoint.retention import leftovers
from .config import Recipe
from .grids.choice import check_named_grids
from .identity import Identity, identity_of
from .recipe_change import check_change
from .records import read_records
from .renewals import check_recorded, read_renewals, renewal_steps
from .run_directory import RunDirectory
from .settings import from_tree
from .trackers import check_trackers
from .weights.origin import Origin, find_origin


@dataclass(frozen=True)
class Preflight:
    """The data that a start will read and the run that it continues, known before any rank talks to another."""

    recipe: Recipe
    """Recipe of this start."""
    manifest: Manifest
    """Manifest of the training data."""
    order: BatchOrder
    """Sequences of every step."""
    run: RunDirectory
    """Directory of the run, which may not exist yet."""
    identity: Identity
    """Recipe, data, code and packages of this start, equal on all ranks."""
    steps_done: int
    """Number of steps in the last checkpoint that seems whole, whose hashes are checked when it is loaded; or 0."""
    renewals: tuple[Renewal, ...] = ()
    """Renewals of the shares that the run has recorded, oldest first; `order` follows from them."""
    origin: Origin | None = None
    """Weights that begin the run; None for random ones, and for a run that has a checkpoint."""

    def check_checkpoint(self, saved: CheckpointManifest, checkpoint: Path) -> None:
        """Raise ValueError unless this start may continue from a checkpoint.

        It must be of the same data and of the same run, and its steps the same under the recipe of this start.
        """
        state = saved.state
        check_trained_on(saved, checkpoint, self.identity.data)
        if state.run != self.identity.run:
            raise ValueError(
                f"checkpoint {checkpoint}: is of run {state.run}, and run_directory = {self.run.path} has run "
                f"{self.identity.run}; move it to the directory of its own run, or name another run_directory"
            )
        if state.order != self.identity.order:
            raise ValueError(
                f"checkpoint {checkpoint}: its steps have order {state.order} of batches, and this LongRing trains in "
                f"order {self.identity.order}; finish the run with the LongRing that began it, or name another "
                f"run_directory and begin it with init.from = {str(checkpoint)!r}"
            )
        before = from_tree(Recipe, state.recipe, source=f"checkpoint {checkpoint}")
        check_recorded(self.run.renewals_file, self.renewals, renewal_steps(before), state.step)
        check_change(before, self.recipe, state.step, self._order_of)

    def _order_of(self, recipe: Recipe) -> BatchOrder:
        """Return the order in which a run with another recipe, and these renewals, reads the same data."""
        return self.order if recipe is self.recipe else order_of(self.manifest, recipe, self.renewals)

    def with_renewals(self, renewals: Sequence[Renewal]) -> Preflight:
        """Return this preflight with other renewals, and with the order that follows from them."""
        return replace(self, renewals=tuple(renewals), order=order_of(self.manifest, self.recipe, renewals))


def preflight(
    recipe: Recipe,
    world_size: int,
    *,
    check_shards: bool = True,
    check_checkpoint: bool = True,
    evaluates: bool = False,
) -> Preflight:
    """Check recipe, world, data, run directory and checkpoint against each other.

    An evaluation trains no batch: with `evaluates` the ranks need not divide the batch of the recipe.

    Raises ValueError for the first that does not fit, and OSError if a file cannot be read. `longring train` calls it
    before it starts any rank, and every rank calls it before it joins the others. The sizes of the shards and of the
    files of the last checkpoint are a request each on a shared file system: one node checks the shards for all, and one
    rank of a world the checkpoint.
    """
    # The recipe alone comes first: these checks read no file. Then come the data, the run and its last checkpoint.
    (recipe.to_evaluate(world_size) if evaluates else recipe).accumulation_steps(world_size)
    check_named_grids(recipe)
    if check_checkpoint and not evaluates:
        check_trackers(recipe.track)
    manifest = open_prepared(recipe.training_directory, recipe.loader, check_shards=check_shards)
    manifest.check_made_from(recipe.data, recipe.order)
    run = RunDirectory(recipe.run_directory)
    run.check_is_run()
    found = last_good_checkpoint(run.checkpoints) if check_checkpoint else None
    # A directory that has lost its records takes the run id of its checkpoint.
    run_id = run.run_id() or (found[1].state.run if found else uuid.uuid4().hex)
    # Without a checkpoint the run begins anew and measures its losses anew, so earlier renewals do not count.
    renewals = read_renewals(run.renewals_file, run_id) if found else ()
    manifest_file = manifest.store.path(MANIFEST_FILE)
    data = read_patiently(manifest_file, lambda: sha256_of(manifest_file))
    checked = Preflight(
        recipe=recipe,
        manifest=manifest,
        order=order_of(manifest, recipe, renewals),
        run=run,
        identity=identity_of(recipe, data, run_id),
        steps_done=found[1].state.step if found else 0,
        renewals=renewals,
    )
    if found:
        checked.check_checkpoint(found[1], found[0])
        return checked
    if not check_checkpoint:
        return checked
    check_nothing_was_saved(run)
    return replace(checked, origin=find_origin(recipe, manifest))


def preflight_together(
    recipe: Recipe, store: Store, world: World, stop_after: int | None = None, *, evaluates: bool = False
) -> Preflight:
    """Do the preflight on every rank, and compare what the ranks are about to train or to evaluate. Collective.

    Raises, on every rank, the error of any of them, or one that names the first difference between them; see `agree`.
    """
    checked: Preflight | None = None
    entries: dict[str, Any] | Exception
    try:
        decides = world.rank == 0
        checked = preflight(recipe, world.size, check_shards=decides, check_checkpoint=decides, evaluates=evaluates)
        # Every rank lists the checkpoints, which shows whether all have the same directory mounted.
        last = complete_checkpoints(checked.run.checkpoints)[:1]
        entries = {
            **checked.identity.common,
            "--stop-after": stop_after or 0,
            LAST_SAVED: last[0].name if last else "none",
            # Rank 0 alone has looked into the checkpoints, and at the first start every rank has made an id of its own.
            "steps_done": checked.steps_done if decides else None,
            "run": checked.identity.run if decides else None,
            "origin": checked.origin and checked.origin._asdict() if decides else None,
            "renewals": [[renewal.step, dict(renewal.losses)] for renewal in checked.renewals] if decides else None,
        }
    except Exception as error:  # of any kind: `agree` tells the other ranks, which would otherwise wait for this one
        entries = error
    agreed = agree(store, world.rank, world.size, entries)
    assert checked is not None, "an error of any rank is raised on all"
    identity = replace(checked.identity, run=agreed["run"])
    origin = agreed["origin"] and Origin(**agreed["origin"])
    checked = replace(checked, identity=identity, steps_done=agreed["steps_done"], origin=origin)
    renewals = [Renewal(*renewal) for renewal in agreed["renewals"]]
    # Ranks other than 0 have read no renewals: so far their order follows from the recipe alone.
    return checked if len(renewals) == len(checked.renewals) else checked.with_renewals(renewals)


def prepared_data(recipe: Recipe) -> Manifest | None:
    """Return the manifest of the recipe's training data, or None if a local directory has none yet.

    Raises ValueError if the manifest is damaged, or if the data was made with other settings; no shard is read.
    """
    directory = recipe.training_directory
    if "://" not in directory and not Path(directory, MANIFEST_FILE).is_file():
        return None
    manifest = open_prepared(directory, recipe.loader, check_shards=False)
    manifest.check_made_from(recipe.data, recipe.order)
    return manifest


def order_of(manifest: Manifest, recipe: Recipe, renewals: Sequence[Renewal] = ()) -> BatchOrder:
    """Return the order in which a run with this recipe and these renewals reads the data of `manifest`."""
    return training_order(
        manifest,
        recipe.curriculum,
        recipe.loader,
        steps=recipe.train.steps,
        global_batch_tokens=recipe.train.global_batch_tokens,
        seed=recipe.train.seed,
        renewals=renewals,
    )


def check_nothing_was_saved(run: RunDirectory) -> None:
    """Raise ValueError if a run without a complete checkpoint has had one: a start would begin again from step 0.

    A run that was killed before its first checkpoint passes, whatever its metrics say: nothing saved was lost.
    """
    if complete_checkpoints(run.checkpoints):
        return  # damaged ones: a resume reports them and puts them aside
    found = [save.get("step") for save in read_records(run.saves_file)]
    found += [start.get("from_step") for start in read_records(run.starts_file)]  # each start loaded this checkpoint
    last = max((step for step in found if isinstance(step, int)), default=0)
    shown = [f"step {last} was saved"] if last else []
    shown += [f"{path.name} was put aside" for path in leftovers(run.checkpoints) if path.suffix == DAMAGED]
    if shown:
        raise ValueError(
            f"run_directory = {run.path}: {', '.join(shown)}, and {run.checkpoints} has no complete checkpoint; mount "
            "its disk or bring a copy back, or name another run_directory to start from the first step"
        )
