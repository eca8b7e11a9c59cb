"""Recipes are read strictly: errors name the key and its value."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from longring.launch.config import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "launch" / "recipes" / "demo.toml"


@pytest.mark.parametrize("recipe", sorted((ROOT / "launch" / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_fits_its_ranks(recipe):
    loaded = load_recipe(recipe)
    least = loaded.max_context_parallel * loaded.parallel.tensor
    assert loaded.accumulation_steps(max(least, loaded.train.ranks_per_node)) >= 1


def test_overrides_win_over_the_file():
    recipe = load_recipe(DEMO, ["train.steps=40", "run_directory=runs/b", "parallel.sequence_parallel=false"])
    assert (recipe.train.steps, recipe.run_directory, recipe.parallel.sequence_parallel) == (40, "runs/b", False)
    assert load_recipe(DEMO, ["train.learning_rate=1"]).train.learning_rate == 1.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", r"train.stepz: unknown key; did you mean train.steps\?"),
        ("nonsense=3", "nonsense: unknown key; remove it"),
        ("train.steps=2.5", "train.steps = 2.5: must be of type int"),
        ("train.steps=true", "train.steps = True: must be of type int"),
        ("train.dtype=float16", "train.dtype = 'float16': must be one of 'float32', 'bfloat16'"),
        ("train=3", "train = 3: must be a table"),
        ("train.steps", "must have the form key=value, such as train.steps=20"),
        ("train.steps=0", "train.steps = 0: must be at least 1"),
        ("train.steps.more=1", "steps is a value, not a table"),
        (
            "train.warmup_steps=5000",
            "below the 5001 steps that train.warmup_steps = 5000, .* take; lower them",
        ),
        (
            "train.global_batch_tokens=3000",
            "3000: must be a positive multiple of the longest bucket in use, 2048 tokens; set it to 4096",
        ),
        ("parallel.tensor=3", "parallel.tensor = 3: must divide model.num_heads = 4, .* set it to 1"),
        ("parallel.tensor=4", "parallel.tensor = 4: must divide model.num_kv_heads = 2, .* set it to 2"),
        ("parallel.tokens_per_rank=500", "parallel.tokens_per_rank = 500: must be a power of two; set it to 256"),
        ("parallel.zero_stage=4", "parallel.zero_stage = 4: must be one of 0, 1, 2, 3"),
        ("parallel.sequence_parallel=true", "and parallel.tensor = 1"),
        ("model.num_kv_heads=3", "model.num_kv_heads = 3: must divide model.num_heads = 4; set it to 2"),
        ("data.max_bucket_tokens=3000", "data.max_bucket_tokens"),
        (
            "train.min_learning_rate=1.0",
            "train.min_learning_rate = 1.0: must be at most train.learning_rate = 0.003; lower it",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(DEMO, [override])


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ValueError, match="none.toml: does not exist"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("steps = = 3")
    with pytest.raises(ValueError, match="broken.toml: not valid TOML"):
        load_recipe(tmp_path / "broken.toml")
    (tmp_path / "short.toml").write_text('run_directory = "runs/a"\n[data]\ndirectory = "d"\n')
    with pytest.raises(ValueError, match="model.num_layers: missing"):
        load_recipe(tmp_path / "short.toml")


@pytest.mark.parametrize(
    ("world_size", "overrides", "message"),
    [
        (
            3,
            [],
            "world of 3 ranks: cannot hold the longest bucket in use, 2048 tokens, .* start a multiple of 4 ranks, or "
            "set parallel.tokens_per_rank = 2048$",
        ),
        (6, [], "start a multiple of 4 ranks, or set parallel.tokens_per_rank = 1024$"),
        (3, ["parallel.tensor=2"], "parallel.tensor = 2: does not divide a world of 3 ranks"),
        (4, ["parallel.tensor=2"], "start a multiple of 8 ranks"),
        (
            8,
            [],
            "train.global_batch_tokens = 2048: must be a multiple of the 4096 tokens of .* 8 ranks .* set it to 4096",
        ),
    ],
)
def test_an_impossible_world_is_refused_with_advice(world_size, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(DEMO, overrides).accumulation_steps(world_size)


@given(
    tensor=st.sampled_from([1, 2]),
    data_size=st.sampled_from([1, 2, 4, 8, 16]),
    tokens_per_rank=st.sampled_from([2**i for i in range(7, 12)]),
)
def test_every_rank_holds_the_same_tokens_in_every_bucket(tensor, data_size, tokens_per_rank):
    recipe = load_recipe(
        DEMO,
        [f"parallel.tensor={tensor}", f"parallel.tokens_per_rank={tokens_per_rank}", "train.global_batch_tokens=32768"],
    )
    if data_size % recipe.max_context_parallel:
        return
    accumulation = recipe.accumulation_steps(tensor * data_size)
    for length in (128, 256, 512, 1024, 2048):
        degree = recipe.parallel.context_parallel(length)
        rows = recipe.parallel.sequences_per_replica(length)
        assert rows * length // degree == tokens_per_rank
        assert accumulation * (data_size // degree) * rows * length == recipe.train.global_batch_tokens


def test_recipe_is_frozen():
    with pytest.raises(AttributeError):
        load_recipe(DEMO).run_directory = "elsewhere"  # type: ignore[misc]
    assert isinstance(load_recipe(DEMO), Recipe)


def test_tables_with_keys_of_the_users_choice_and_lists(recipe_file):
    recipe = load_recipe(
        recipe_file,
        [
            "data.source={}",
            'data.sources.web={kind="json", path="a"}',
            'data.sources.books={kind="parquet", path="b"}',
            'curriculum.shares={web=0.3, "@64"=[[0, 0.5], [1, 1]]}',
            "curriculum.shares.books@512=0.1",
            "curriculum.odds=[4, 2, 1, 0.5]",
        ],
    )
    assert [(name, source.kind) for name, source in recipe.data.named_sources.items()] == [
        ("web", "json"),
        ("books", "parquet"),
    ]
    shares = {"web": 0.3, "@64": ((0.0, 0.5), (1.0, 1.0)), "books@512": 0.1}
    assert recipe.curriculum.shares == shares
    assert recipe.curriculum.odds == (4.0, 2.0, 1.0, 0.5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sources.web={kynd=1}", r"data\.sources\.web\.kynd: unknown key; did you mean data\.sources\.web\.kind"),
        ("data.sources=3", r"data\.sources = 3: must be a table"),
        ('curriculum.shares={web="a"}', r"curriculum\.shares\.web = 'a': must be of type float"),
        ("curriculum.shares.web=[[0, 1, 2]]", r"curriculum\.shares\.web = \[0, 1, 2\]: must be a list of 2 numbers"),
        ("curriculum.shares.web=[0, 1]", r"curriculum\.shares\.web = 0: must be a list of 2 numbers"),
        ("curriculum.shares.web=1.5", r"curriculum\.shares\.web = 1\.5: must be at least 0 and at most 1"),
        (
            "curriculum.weights={documents=2.0}",
            r"curriculum\.weights = \{'documents': 2\.0\}: .*; name the sources' shares of the trained tokens in "
            r"curriculum\.shares",
        ),
        ("curriculum.odds=grow", r"curriculum\.odds = 'grow': must be one of 'uniform', .*, or numbers"),
        ('curriculum.odds=["a"]', r"curriculum\.odds = 'a': must be of type float"),
    ],
)
def test_a_mistake_in_tables_and_lists_is_named(recipe_file, override: str, message: str):
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe_file, [override])


def test_recipes_that_had_no_weights_of_sources_are_read(recipe_file):
    assert load_recipe(recipe_file, ["curriculum.weights={}"]) == load_recipe(recipe_file)
    assert load_recipe(recipe_file, ["curriculum.shares={documents=1.0}"]).curriculum.shares == {"documents": 1.0}


@pytest.mark.parametrize("steps", ["120", "124-120", "0-3", "a-b"])
def test_the_steps_of_a_trace(recipe_file, steps):
    with pytest.raises(ValueError, match=f"train.profile = '{steps}': not a first and a last step") as error:
        load_recipe(recipe_file, [f"train.profile='{steps}'"])
    assert str(error.value).endswith("; set it to a few steps such as '120-124', or leave it empty")
    assert load_recipe(recipe_file, ["train.profile=120-124"]).train.profile_steps == (120, 124)
    assert load_recipe(recipe_file, ["train.profile=''"]).train.profile_steps == (0, 0)
