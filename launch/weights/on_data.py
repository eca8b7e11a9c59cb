"""Weights that read other data than their own: the recipe of their evaluation, and the checks that all fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ...data.format.manifest import Manifest, open_prepared
from ..config import Recipe, load_recipe
from ..grids.choice import check_named_grids
from ..settings import apply_overrides, from_tree, to_tree
from .origin import Weights, check_settable, weights_at


def weights_on_data(
    path: Path, data: str, overrides: Sequence[str], num_ranks: int
) -> tuple[Weights, Recipe, Manifest]:
    """Return the weights at `path`, the recipe of their evaluation on `num_ranks` ranks, and the manifest of its data.

    `data` is prepared data, or a recipe that names some and a division among ranks. Raises ValueError, which names
    `path` if it is at fault, if there are no such weights or data, or if they do not fit each other or the ranks.
    """
    try:
        weights = weights_at(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    recipe = recipe_of_weights(weights, data, overrides, num_ranks)
    recipe.accumulation_steps(num_ranks)
    check_named_grids(recipe)
    manifest = open_prepared(recipe.training_directory, recipe.loader)
    manifest.check_made_from(recipe.data, recipe.order)
    try:
        weights.check_tokens(manifest)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return weights, recipe, manifest


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
                **{"steps": 1, "learning_rate": 1.0},  # have no default, and no effect here
                "dtype": "bfloat16" if torch.cuda.is_available() else "float32",
            },
        }
        if manifest.order is not None:
            tree["order"] = {**manifest.order, "directory": data}
    tree |= {"model": to_tree(weights.config), "init": {}, "curriculum": {}, "run_directory": "logs"}
    # A batch that holds the longest sequence; `to_evaluate` then takes one that the ranks can divide.
    tree["train"]["global_batch_tokens"] = tree["data"]["max_bucket_tokens"]
    overridden = apply_overrides(tree, overrides)
    return from_tree(Recipe, tree, source=data, overridden=overridden).to_evaluate(num_ranks)
