"""The target of an evaluation: weights, the data that they read, and their division among ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import Store

from ..data.format.manifest import Manifest
from ..parallel.mesh import Mesh
from ..parallel.world import World
from ..parallel.zero import DeepSpeedEngine
from .agreement import agree
from .checkpoint.format import no_good_checkpoint
from .checkpoint.load import load_last_good
from .config import Recipe
from .identity import OWN_TO_A_MACHINE, code_hash
from .preflight import preflight_together
from .run_directory import RunDirectory
from .settings import flat, to_tree
from .weights.begin import load_origin
from .weights.on_data import weights_on_data
from .weights.origin import Weights


@dataclass(frozen=True)
class Target:
    """Weights to evaluate; all ranks have agreed on them."""

    name: str
    """Name in tables and records."""
    recipe: Recipe
    """Recipe of the model, the data and the division among ranks."""
    manifest: Manifest
    """Manifest of the data."""
    run: RunDirectory
    """Directory of logs and reports of hangs."""
    load: Callable[[DeepSpeedEngine, Mesh], int]
    """Function that loads the weights and returns the number of steps that LongRing has trained them. Collective."""


def target_of_run(recipe: Recipe, store: Store, world: World) -> Target:
    """Return the target of a run: its last good checkpoint, on its own data. Collective.

    Any number of ranks that can hold the longest sequences may evaluate it. Raises ValueError if there is no
    checkpoint, or if it is not of this recipe.
    """
    checked = preflight_together(recipe, store, world, evaluates=True)
    if not checked.steps_done:
        raise no_good_checkpoint(checked.run.checkpoints)

    def load(engine: DeepSpeedEngine, mesh: Mesh) -> int:
        loaded = load_last_good(engine, checked.run.checkpoints, mesh, checked.check_checkpoint)
        assert loaded is not None, "preflight has found a checkpoint"
        return loaded[1].step

    return Target(checked.run.path.name, recipe.to_evaluate(world.size), checked.manifest, checked.run, load)


def target_of_weights(
    path: Path, data: str, overrides: Sequence[str], logs: RunDirectory, store: Store, world: World
) -> Target:
    """Return the target of the weights at `path`, of any kind that a run can begin with, on other data. Collective.

    `data` is prepared data, or a recipe that names some and a division among ranks. Raises ValueError if there are no
    such weights or data, or if they do not fit each other or the ranks.
    """
    found: tuple[Weights, Recipe, Manifest] | None = None
    entries: dict[str, Any] | Exception
    try:
        found = weights, recipe, _ = weights_on_data(path, data, overrides, world.size)
        same = {key: value for key, value in flat(to_tree(recipe)).items() if not key.startswith(OWN_TO_A_MACHINE)}
        entries = {**same, "weights": weights.origin._asdict(), "SHA-256 of LongRing's code": code_hash()[:16]}
    except Exception as error:  # of any kind: `agree` tells the other ranks, which would otherwise wait for this one
        entries = error
    agree(store, world.rank, world.size, entries)
    assert found is not None, "an error of any rank is raised on all"
    weights, recipe, manifest = found
    recipe = replace(recipe, run_directory=str(logs.path))  # measured grids are kept there, no longer than the logs

    def load(engine: DeepSpeedEngine, mesh: Mesh) -> int:
        load_origin(engine, weights.origin, mesh, moments=False)
        return weights.origin.step

    return Target(path.absolute().name, recipe, manifest, logs, load)
