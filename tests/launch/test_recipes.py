"""The recipes for real models: each is planned by the command in its first lines, and has the published sizes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from longring.launch import cli
from longring.launch.config import Recipe, load_recipe
from longring.launch.learning_rate import learning_rate
from longring.launch.settings import flat, to_tree
from longring.launch.weights.origin import MAY_DIFFER
from longring.model.families.read import PublishedModel
from longring.model.families.weights import weights_of
from longring.model.families.write import family_of

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
PLANNED = {
    file.stem: int(found[1])
    for file in sorted(RECIPES.glob("*.toml"))
    if (found := re.search(r"longring plan RECIPE --ranks (\d+)", file.read_text()))
}
"""Number of ranks of each recipe that names one."""
PUBLISHED = {
    "llama-3.1-8b-128k": ("llama", 128_256, 8_030_261_248),
    "llama-3.1-8b-1m": ("llama", 128_256, 8_030_261_248),
    "llama-3-70b-128k": ("llama", 128_256, 70_553_706_496),
    "qwen3-8b-256k": ("qwen3", 151_936, 8_190_735_360),
    "prolong-64k": ("llama", 128_256, 8_030_261_248),
    "prolong-512k": ("llama", 128_256, 8_030_261_248),
    "olmo-3-7b-64k": ("olmo3", 100_278, 7_298_011_136),
}
"""Family, rows of the embedding, and parameters of the published model."""


def recipe_of(name: str, *overrides: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.toml", overrides)


def test_the_recipes_for_real_models_are_here():
    assert PLANNED.keys() == PUBLISHED.keys() | {"1b-8k", "1b-128k"}


@pytest.mark.full
@pytest.mark.parametrize("name", PLANNED)
def test_a_recipe_is_planned_as_its_first_lines_say(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["plan", str(RECIPES / f"{name}.toml"), "--ranks", str(PLANNED[name])]) == 0
    printed = capsys.readouterr().out
    assert f"{PLANNED[name]} ranks, " in printed
    assert max(map(len, printed.splitlines())) <= 80
    recipe = recipe_of(name)
    longest = recipe.data.max_bucket_tokens
    assert (recipe.max_context_parallel == 1) == ("every bucket fits one rank" in printed)
    assert recipe.max_context_parallel == 1 or f"{longest:,}" in printed
    # Nodes are whole, and a ring that is no larger than a node stays inside one.
    assert PLANNED[name] % recipe.slurm.ranks_per_node == 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_sizes(name):
    family, rows, parameters = PUBLISHED[name]
    config = recipe_of(name).model
    model = PublishedModel(family=family, config=config, vocab_size=rows, max_tokens=8192)
    assert family_of(config) == family
    assert config.vocab_size == rows  # `init.from` refuses another number
    assert (
        sum(torch.Size(shape).numel() for weight in weights_of(model) for shape in weight.theirs.values()) == parameters
    )


def test_every_recipe_for_a_real_model_names_the_shares_of_all_its_sources():
    for name in PLANNED:
        recipe = recipe_of(name)
        shares = {key: share for key, share in recipe.curriculum.shares.items() if "@" not in key}
        assert shares.keys() == set(recipe.data.prepared_sources), name
        constant = [share for share in shares.values() if not isinstance(share, tuple)]
        assert sum(constant) == pytest.approx(1), name


def test_the_second_phase_goes_on_where_the_first_has_not_decayed():
    first, second = recipe_of("1b-8k"), recipe_of("1b-128k")
    assert second.init.moments
    assert second.init.from_.startswith(f"{first.run_directory}/checkpoints/step-")
    step = int(second.init.from_.rpartition("-")[2])
    assert step % first.train.keep_checkpoint_every_steps == 0
    rates = [learning_rate(step, first.train), learning_rate(step + 1, first.train), learning_rate(1, second.train)]
    assert rates[0] == first.train.learning_rate > rates[1]
    assert rates[2] == pytest.approx(rates[0], rel=1e-3)
    before, now = flat(to_tree(first.model)), flat(to_tree(second.model))
    assert {key for key in before if before[key] != now[key]} == {"rope_base"}
    assert "rope_base".startswith(MAY_DIFFER)
    assert second.data.tokenizer.path == f"{first.run_directory}/tokenizer.json"
