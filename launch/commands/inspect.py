"""`longring inspect`: the content of prepared data, with the recipe that trains on it or alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ...data.config import LoaderConfig
from ...data.curriculum_config import CurriculumConfig
from ...data.format.manifest import MANIFEST_FILE, open_prepared
from ...data.inspect.as_json import inspected_json
from ...data.inspect.cost import PAPER_1B, ModelSize
from ...data.inspect.inspect import inspect
from ...model.config import ModelConfig
from ..config import load_recipe
from ..flops import ModelFlops
from ..run_directory import RunDirectory
from ..settings import apply_overrides, from_tree


def inspect_target(target: Path, overrides: Sequence[str], console: Console, *, as_json: bool = False) -> None:
    """Inspect prepared data, or the data of a run or of a recipe; `as_json` prints JSON, without samples and picture.

    Raises ValueError if the target is none of these, if its data is damaged, or for an override that does not apply.
    """
    recipe = None
    if target.is_file():
        recipe = load_recipe(target, overrides)
    elif not (target / MANIFEST_FILE).exists() and (target / "recipe.json").exists():
        recipe = RunDirectory(target).recipe(overrides)
    settings: dict[str, Any]
    if recipe is not None:
        manifest = open_prepared(recipe.training_directory, recipe.loader)
        settings = {
            "curriculum": recipe.curriculum,
            "loader": recipe.loader,
            "model": model_size(recipe.model, manifest.vocab_size),
            "steps": recipe.train.steps,
            "global_batch_tokens": recipe.train.global_batch_tokens,
            "seed": recipe.train.seed,
        }
    else:
        tree: dict[str, Any] = {}
        overridden = apply_overrides(tree, overrides)
        if unknown := sorted(tree.keys() - {"curriculum", "loader"}):
            raise ValueError(
                f"override {unknown[0]}.*: data without a recipe takes only curriculum.* and loader.*; name a recipe"
            )
        loader = from_tree(LoaderConfig, tree.get("loader", {}), prefix="loader.", overridden=overridden)
        curriculum = from_tree(
            CurriculumConfig, tree.get("curriculum", {}), prefix="curriculum.", overridden=overridden
        )
        manifest = open_prepared(target, loader)
        settings = {"curriculum": curriculum, "loader": loader, "model": PAPER_1B, "steps": 1_000, "seed": 0}
    if as_json:
        print(json.dumps(inspected_json(manifest, **settings), indent=1))
    else:
        inspect(manifest, console, **settings)


def model_size(model: ModelConfig, vocab_size: int) -> ModelSize:
    """Return the sizes that determine the FLOPs of a model."""
    flops = ModelFlops.of(model, vocab_size)
    return ModelSize(
        name=f"{model.num_layers} layers of {model.hidden_size:,}, vocabulary {vocab_size:,}",
        parameters=flops.parameters,
        num_layers=model.num_layers,
        attention_width=flops.attention_width,
    )
