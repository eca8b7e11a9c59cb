"""A small recipe with prepared data, for tests of whole runs."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.faulty import Run
from longring.data.prepare.prepare import prepare
from longring.launch.config import load_recipe
from rich.console import Console

RECIPE = """
run_directory = "{directory}/run"
[data]
directory = "{directory}/data"
min_bucket_tokens = 64
max_bucket_tokens = 512
held_out_fraction = 0.1
source = {{ kind = "json", path = "{directory}/documents.jsonl" }}
tokenizer = {{ vocab_size = 500 }}
[curriculum]
cycles = 2
[model]
num_layers = 2
hidden_size = 64
num_heads = 4
num_kv_heads = 2
ffn_hidden_size = 96
[parallel]
tokens_per_rank = 512
[train]
steps = 20
global_batch_tokens = 2048
learning_rate = 3e-3
min_learning_rate = 1e-3
warmup_steps = 4
clip_grad_norm = 0.5
dtype = "float32"
"""


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory) -> Path:
    """The recipe, beside the directory of its prepared data."""
    directory = tmp_path_factory.mktemp("equivalence")
    file = directory / "recipe.toml"
    file.write_text(RECIPE.format(directory=directory))
    # Documents of about 64 to 600 tokens, so that some steps train on each bucket.
    source = Path(textwrap.__file__).with_name("argparse.py").read_text()
    lengths = [200, 2100, 400, 900, 300, 1800, 250, 1100]
    starts = np.cumsum([0, *lengths * 11])
    documents = [source[start : start + length] for start, length in zip(starts, lengths * 11, strict=False)]
    (directory / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    prepare(load_recipe(file).data, Console(quiet=True))
    return file


@pytest.fixture(autouse=True)
def new_run_directory(request) -> Iterator[None]:
    """Every test finds no run in the directory that the recipe names."""
    yield
    if "recipe_file" in request.fixturenames:
        shutil.rmtree(request.getfixturevalue("recipe_file").parent / "run", ignore_errors=True)


@pytest.fixture(scope="session")
def whole(recipe_file, tmp_path_factory) -> Run:
    """A run of twelve steps on two ranks, without faults."""
    run = Run(recipe_file, tmp_path_factory.mktemp("whole"))
    assert run.start(overrides=["train.profile=3-4", "train.profile_ranks=[1]"]) == [0, 0], run.said
    return run


@pytest.fixture
def unread_recipe(tmp_path) -> Path:
    """A recipe whose data are never read."""
    file = tmp_path / "recipe.toml"
    file.write_text(
        f'run_directory = "{tmp_path}/run"\n[data]\ndirectory = "{tmp_path}/data"\nmin_bucket_tokens = 64\n'
        f'max_bucket_tokens = 1024\nsource = {{ kind = "json", path = "{tmp_path}/texts" }}\n'
        "[model]\nnum_layers = 2\nhidden_size = 64\nnum_heads = 4\nnum_kv_heads = 2\nffn_hidden_size = 96\n"
        '[parallel]\ntokens_per_rank = 512\n[train]\ndtype = "float32"\nsteps = 20\nglobal_batch_tokens = 2048\n'
        "learning_rate = 3e-3\nmin_learning_rate = 1e-3\nwarmup_steps = 4\n"
    )
    return file
