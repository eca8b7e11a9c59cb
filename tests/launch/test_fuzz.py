"""Recipes, manifests and shards of any content are read or refused with an explanation, never another exception."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from longring.data.config import LoaderConfig
from longring.data.format.manifest import open_prepared
from longring.data.read.batch_order import ReplicaShare
from longring.data.read.loader import Loader
from longring.launch.commands.plan import plan
from longring.launch.config import Recipe, load_recipe
from longring.launch.preflight import preflight
from longring.launch.run_directory import RunDirectory
from longring.launch.trainer import read
from rich.console import Console

FUZZ = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])

# One line: a file or a key first, then what is wrong, then a limit or, after a semicolon, what to do.
FORM = re.compile(r"(recipe |override |world of |checkpoint )?\S[^\n]*?(: | over )[^\n]*(must |; )[^\n]+")
SLOW = {"steps": 10_000, "ranks": 8, "layers": 100}
"""Recipes above these numbers are checked and not priced, which would take minutes."""

scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


def explained(function: Callable[[], object], *words: str) -> None:
    """Call `function`; an error that it raises must contain one of the words."""
    try:
        function()
    except (ValueError, OSError) as error:
        said = str(error)
    else:
        return
    assert any(word in said for word in words), said


@st.composite
def changed(draw: st.DrawFn, content: bytes) -> bytes:
    """Return the content with a few spans replaced, or truncated."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.integers(0, 12)))
        content = content[:start] + draw(st.binary(max_size=12)) + content[stop:]
    return content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content


@st.composite
def replaced(draw: st.DrawFn, tree: Any) -> Any:
    """Return the tree with one value replaced, removed, or moved to another key."""
    if not isinstance(tree, dict) or not tree or draw(st.integers(0, 4)) == 0:
        return draw(trees)
    key = draw(st.sampled_from(sorted(tree)))
    rest = {name: value for name, value in tree.items() if name != key}
    match draw(st.integers(0, 5)):
        case 0:
            return rest
        case 1:
            return {**rest, draw(st.text(max_size=8)): tree[key]}
        case _:
            return {**rest, key: draw(replaced(tree[key]))}


def keys(tree: Any, prefix: str = "") -> list[str]:
    """Return the dotted paths of all values."""
    if not isinstance(tree, dict):
        return [prefix]
    return [path for name, value in tree.items() for path in keys(value, f"{prefix}.{name}".lstrip("."))]


def accepted(load: Callable[[], Recipe]) -> bool:
    """Load a recipe, check it against data and run as a start does, and price its grids.

    Returns False if it is refused; every error must have the one form.
    """
    try:
        recipe = load()
        ranks = recipe.max_context_parallel * recipe.parallel.tensor
        sizes = {"steps": recipe.train.steps, "ranks": ranks, "layers": recipe.model.num_layers}
        if all(sizes[name] <= SLOW[name] for name in SLOW):
            preflight(recipe, ranks)
            plan(recipe, Console(quiet=True))
    except ValueError as error:
        assert FORM.fullmatch(str(error)), error  # noqa: PT017
        return False
    return True


@FUZZ
@given(data=st.data())
def test_recipes_of_any_text(recipe_file, tmp_path, data):
    file = tmp_path / "recipe.toml"
    file.write_bytes(data.draw(changed(recipe_file.read_bytes())))
    accepted(lambda: load_recipe(file))


def test_what_is_accepted_is_run_and_what_is_refused_has_the_form(recipe_file):
    """The two judgments of `accepted` are seen to differ."""
    assert accepted(lambda: load_recipe(recipe_file))
    assert not accepted(lambda: load_recipe(recipe_file, ["data.directory=/nowhere"])), "refused by the preflight"
    assert not accepted(lambda: load_recipe(recipe_file, ["train.steps=0"]))
    for message in ("list index out of range", "division by zero", "a.b", "train.steps: 3\nmust be; less"):
        assert not FORM.fullmatch(message)

    def broken() -> Recipe:
        raise ValueError("not enough values to unpack (expected 2, got 1)")

    with pytest.raises(AssertionError):
        accepted(broken)


@pytest.fixture(scope="module")
def paths(recipe_file, tmp_path_factory) -> list[str]:
    run = RunDirectory(tmp_path_factory.mktemp("paths") / "run")
    run.create(load_recipe(recipe_file))
    return keys(json.loads(run.recipe_file.read_text()))


@FUZZ
@given(data=st.data())
def test_settings_of_any_value(recipe_file, paths, data):
    key = data.draw(st.sampled_from(paths))
    value = data.draw(
        trees.map(json.dumps) | st.text(max_size=20) | st.sampled_from(["-1", "0", "1", "nan", "inf", "1e400", "1e308"])
    )
    accepted(lambda: load_recipe(recipe_file, [f"{key}={value}"]))


@FUZZ
@given(data=st.data())
def test_a_runs_recipe_of_any_content(recipe_file, tmp_path, data):
    run = RunDirectory(tmp_path / "run")
    run.create(load_recipe(recipe_file))
    tree = json.loads(run.recipe_file.read_text())
    run.recipe_file.write_text(json.dumps(data.draw(replaced(tree))))
    accepted(run.recipe)


@pytest.fixture
def prepared(recipe_file, tmp_path) -> Path:
    return Path(shutil.copytree(recipe_file.parent / "data", tmp_path / "data"))


@FUZZ
@given(data=st.data())
def test_manifests_of_any_content(recipe_file, prepared, data):
    file = prepared / "manifest.json"
    text = (recipe_file.parent / "data" / "manifest.json").read_text()
    file.write_bytes(
        data.draw(changed(text.encode()) | replaced(json.loads(text)).map(lambda tree: json.dumps(tree).encode()))
    )
    settings = [f"data.directory={prepared}", f"run_directory={prepared}/run"]
    accepted(lambda: load_recipe(recipe_file, settings))


@pytest.mark.full
@FUZZ
@given(data=st.data())
def test_shards_of_any_content(recipe_file, prepared, data):
    """Every row is read, or the rank says what is wrong with it. The size is right: other sizes are refused earlier."""
    shards = sorted((recipe_file.parent / "data").rglob("train*.tar"))
    shard = data.draw(st.sampled_from(shards))
    content = bytearray(shard.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content) - 1) | st.integers(max(0, len(content) - 3000), len(content) - 1))
        new = data.draw(st.binary(min_size=1, max_size=40))[: len(content) - start]
        content[start : start + len(new)] = new
    copy = prepared / shard.relative_to(recipe_file.parent / "data")
    copy.write_bytes(content)
    recipe, config = load_recipe(recipe_file), LoaderConfig(workers=0)
    order = preflight(recipe, 1).order
    loader = Loader(
        open_prepared(str(prepared), config), order, config, lambda length: ReplicaShare(0, 1, 2048 // length)
    )

    def read_all() -> None:
        batches = loader.batches(0, 8)
        for step in range(1, 9):
            assert read(batches, step, 0).rows.dtype == np.uint16

    explained(read_all, "RECIPE --verify`, which makes it again")
    shutil.copyfile(shard, copy)
