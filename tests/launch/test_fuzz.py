"""Recipes, manifests and shards of any content are read or refused with an explanation, never another exception."""

from __future__ import annotations

import json
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
from longring.launch.config import load_recipe
from longring.launch.preflight import preflight
from longring.launch.run_directory import RunDirectory
from longring.launch.trainer import read

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "launch" / "recipes" / "demo.toml"
FUZZ = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])

NUMBERS = ["-1", "0", "nan", "inf", "1e400"]

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


@FUZZ
@given(data=st.data())
def test_recipes_of_any_text(tmp_path, data):
    file = tmp_path / "recipe.toml"
    file.write_bytes(data.draw(changed(DEMO.read_bytes())))
    explained(lambda: load_recipe(file), "recipe", ".")


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
        trees.map(json.dumps) | st.text(max_size=20) | st.sampled_from(["-1", "0", "nan", "inf", "1e400"])
    )
    explained(lambda: load_recipe(recipe_file, [f"{key}={value}"]), key.split(".")[0])


@FUZZ
@given(data=st.data())
def test_a_runs_recipe_of_any_content(recipe_file, tmp_path, data):
    run = RunDirectory(tmp_path / "run")
    recipe = load_recipe(recipe_file)
    run.create(recipe)
    tree = json.loads(run.recipe_file.read_text())
    run.recipe_file.write_text(json.dumps(data.draw(replaced(tree))))
    for function in (run.recipe, lambda: run.check(recipe)):
        explained(function, str(run.path), "must", " is ")


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
    explained(lambda: preflight(load_recipe(recipe_file, settings), 1), str(prepared), "data.", "curriculum.")


@pytest.mark.full
@FUZZ
@given(data=st.data())
def test_shards_of_any_content(recipe_file, prepared, data):
    """Every row is read, or the rank reports that it cannot. The size is right: other sizes are refused earlier."""
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

    explained(read_all, "rank 0 cannot read its rows of step")
    shutil.copyfile(shard, copy)
