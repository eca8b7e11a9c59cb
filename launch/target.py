"""The target of an evaluation: weights, the data that they read, and their division among ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import Store

from ..data.format.manifest import Manifest, open_prepared
from ..parallel.mesh import Mesh
from ..parallel.world import World
from ..parallel.zero import DeepSpeedEngine
from .agreement import agree
from .checkpoint.format import no_good_checkpoint
from .checkpoint.load import load_last_good
from .config import Recipe, load_recipe
from .grids.choice import check_named_grids
from .identity import OWN_TO_A_MACHINE, code_hash
from .preflight import preflight_together
from .run_directory import RunDirectory
from .settings import apply_overrides, flat, from_tree, to_tree
from .weights.begin import load_origin
from .weights.origin import Weights, check_settable, weights_at


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
    """Load the weights and return the number of steps that they were trained here. Collective."""


def target_of_run(recipe: Recipe, store: Store, world: World) -> Target:
    """Return the last good checkpoint of the recipe's run, on its own data. Collective.

    Raises ValueError if there is none, or if it is not of this recipe.
    """
    checked = preflight_together(recipe, store, world)
    if not checked.steps_done:
        raise no_good_checkpoint(checked.run.checkpoints)

    def load(engine: DeepSpeedEngine, mesh: Mesh) -> int:
        loaded = load_last_good(engine, checked.run.checkpoints, mesh, checked.check_checkpoint)
        assert loaded is not None, "preflight has found a checkpoint"
        return loaded[1].step

    return Target(checked.run.path.name, recipe, checked.manifest, checked.run, load)


def target_of_weights(
    path: Path, data: str, overrides: Sequence[str], logs: RunDirectory, store: Store, world: World
) -> Target:
    """Return the weights at `path`, of any kind that a run can begin with, on other data. Collective.

    `data` is prepared data, or a recipe that names some and a division among ranks. Raises ValueError if there are no
    such weights or data, or if they do not fit each other or the ranks.
    """
    found: tuple[Weights, Recipe, Manifest] | None = None
    entries: dict[str, Any] | Exception
    try:
        weights = weights_at(path)
        recipe = recipe_of_weights(weights, data, overrides, world.size)
        recipe.accumulation_steps(world.size)
        check_named_grids(recipe)
        manifest = open_prepared(recipe.training_directory, recipe.loader)
        manifest.check_made_from(recipe.data, recipe.order)
        try:
            weights.check_tokens(manifest)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        found = weights, recipe, manifest
        same = {key: value for key, value in flat(to_tree(recipe)).items() if not key.startswith(OWN_TO_A_MACHINE)}
        entries = {**same, "weights": weights.origin._asdict(), "SHA-256 of LongRing's code": code_hash()[:16]}
    except Exception as error:  # whatever it is, no other rank waits for this one
        entries = error
    agree(store, world.rank, world.size, entries)
    assert found is not None, "an error of any rank is raised on all"
    weights, recipe, manifest = found
    recipe = replace(recipe, run_directory=str(logs.path))  # measured grids are kept there, no longer than the logs

    def load(engine: DeepSpeedEngine, mesh: Mesh) -> int:
        load_origin(engine, weights.origin, mesh, moments=False)
        return weights.origin.step

    return Target(path.absolute().name, recipe, manifest, logs, load)


def recipe_of_weights(weights: Weights, data: str, overrides: Sequence[str], num_ranks: int) -> Recipe:
    """Return a recipe to evaluate weights on data.

    Without a recipe in `data`, a sequence of the largest bucket is spread over as many of the ranks as can share one.
    Raises ValueError, with the key at fault, if a setting is wrong.
    """
    check_settable(overrides)
    if Path(data).is_file():
        tree = to_tree(load_recipe(data))
    else:
        manifest = open_prepared(data, check_shards=False)
        longest, ranks = max(manifest.lengths), num_ranks & -num_ranks  # the largest power of two that divides them
        tree = {
            "data": {**manifest.config, "directory": data},
            "parallel": {"tokens_per_rank": max(1, longest // ranks), "zero_stage": 3 if num_ranks > 1 else 0},
            "train": {
                **{"steps": 1, "learning_rate": 1.0},
                "dtype": "bfloat16" if torch.cuda.is_available() else "float32",
            },
        }
        if manifest.order is not None:
            tree["order"] = {**manifest.order, "directory": data}
    tree |= {"model": to_tree(weights.config), "init": {}, "curriculum": {}, "run_directory": "logs"}
    # A batch that any number of ranks can divide; none is trained.
    tree["train"]["global_batch_tokens"] = tree["data"]["max_bucket_tokens"] * num_ranks
    apply_overrides(tree, overrides)
    return from_tree(Recipe, tree, source=data)
