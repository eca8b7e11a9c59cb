"""A run that begins from the weights of another: other data, lengths, RoPE and ranks, and the same weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from helpers.faulty import Run, start
from helpers.lanes import by_lane
from helpers.small_checkpoint import read_whole
from longring.data.files import sha256_of
from longring.data.format.manifest import open_prepared
from longring.data.prepare.prepare import prepare
from longring.launch.build import build_engine
from longring.launch.checkpoint.format import complete_checkpoints, read_checkpoint_manifest
from longring.launch.config import load_recipe
from longring.launch.preflight import preflight
from longring.launch.records import read_records
from longring.launch.train import train
from longring.launch.weights.begin import load_origin
from longring.launch.weights.origin import MAY_DIFFER, Origin, find_origin
from longring.model.config import ModelConfig
from longring.parallel.fragments import updates
from longring.parallel.mesh import join
from rich.console import Console

# Steps of this rate change nothing: weights of fp32 stay as they are, bit by bit.
STILL = ["train.steps=1", "train.learning_rate=1e-30", "train.min_learning_rate=0", "train.warmup_steps=0"]
STILL += ["train.clip_grad_norm=0", "parallel.cp.topology=full_mesh"]
DIVISIONS = {
    "zero0": (2, ["parallel.zero_stage=0"]),
    "zero1-cp4": (4, ["parallel.zero_stage=1", "parallel.tokens_per_rank=256"]),
    "zero3-tp2": (4, ["parallel.zero_stage=3", "parallel.tensor=2"]),
}


@pytest.fixture(scope="module")
def longer(recipe_file, tmp_path_factory) -> list[str]:
    """Settings of a second phase: the documents at twice the length with the same tokenizer, and another RoPE base."""
    directory = tmp_path_factory.mktemp("longer")
    settings = [
        f"data.directory={directory}/data",
        "data.max_bucket_tokens=1024",
        f"data.tokenizer.path={recipe_file.parent}/data/tokenizer.json",
        "model.rope_base=5e5",
    ]
    prepare(load_recipe(recipe_file, settings).data, Console(quiet=True))
    return settings


def run_all(recipe_file: Path, overrides: list[str]) -> None:
    train(load_recipe(recipe_file, overrides), Console(quiet=True))


def updates_after_loading(recipe_file: Path, settings: list[str], checkpoint: Path, moments: bool) -> int:
    """Return AdamW's number of updates after weights, and moments or not, have been loaded."""
    recipe = load_recipe(recipe_file, settings)
    mesh = join(recipe.parallel, recipe.max_context_parallel)
    engine = build_engine(recipe, open_prepared(recipe.data.directory).vocab_size, mesh)
    origin = Origin(str(checkpoint), sha256_of(checkpoint / "manifest.json"), 12)
    load_origin(engine, origin, mesh, moments=moments)
    return updates(engine)


@pytest.mark.parametrize("division", by_lane(DIVISIONS, quick=[], slow=["zero3-tp2"]))
def test_a_run_begins_with_the_weights_of_another(on_ranks, recipe_file, whole, longer, tmp_path, division):
    num_ranks, settings = DIVISIONS[division]
    runs = {}
    for moments in ("false", "true"):
        begin = [f"init.from={whole.path}", f"init.moments={moments}", f"run_directory={tmp_path}/{moments}"]
        on_ranks(num_ranks, run_all, recipe_file, [*longer, *STILL, *settings, *begin])
        runs[moments] = read_whole(tmp_path / moments / "checkpoints" / "step-00000001")
    last = complete_checkpoints(whole.path / "checkpoints")[0]
    before, beta1, beta2 = read_whole(last), 0.9, 0.95
    for name, values in before.items():
        weights_alone, with_moments = runs["false"][name], runs["true"][name]
        if name.endswith("/weight"):
            np.testing.assert_array_equal(weights_alone, values)
            np.testing.assert_array_equal(with_moments, values)
        else:  # both runs have had the same gradient, which is all that there is without moments
            kept = (beta1 if name.endswith("/exp_avg") else beta2) * values
            rounding = 4 * np.finfo(np.float32).eps * (abs(kept) + abs(weights_alone))
            assert (abs(with_moments - (kept + weights_alone)) <= rounding).all(), name
    [first] = read_records(tmp_path / "true" / "starts.jsonl")
    assert first["origin"] == {
        "checkpoint": str(last),
        "sha256": first["origin"]["sha256"],
        "step": 12,
    }
    # AdamW's number of updates goes on with the moments alone; a resume from the new run's checkpoint begins with both.
    assert [on_ranks(num_ranks, updates_after_loading, recipe_file, settings, last, m)[0] for m in (True, False)] == [
        read_checkpoint_manifest(last).state.updates,
        0,
    ]


@pytest.mark.full
def test_a_run_that_has_a_checkpoint_no_longer_needs_the_one_it_began_from(recipe_file, whole, tmp_path):
    base = whole.copy(tmp_path / "base")
    settings = [f"init.from={base.path}", "train.learning_rate=1e-3", "train.initial_learning_rate=1e-4"]
    parts, at_once = (Run(recipe_file, tmp_path / name, settings) for name in ("parts", "whole"))
    assert at_once.start() == [0, 0], at_once.said
    assert "weights from step 12 of" in at_once.said
    assert parts.start(stop_after=6) == [0, 0], parts.said
    shutil.rmtree(base.path)
    parts.finish(at_once)


@pytest.mark.full
def test_a_damaged_origin_ends_the_start_before_a_step(recipe_file, whole, tmp_path):
    base = whole.copy(tmp_path / "base")
    file = next(complete_checkpoints(base.path / "checkpoints")[0].glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    run = Run(recipe_file, tmp_path, [f"init.from={base.path}"])
    for _ in range(2):
        assert run.start() == [2, 2]
        assert (
            "error: weights of " in run.said and ": damaged: " in run.said and "; name another checkpoint" in run.said
        )
        assert file.exists() and not (run.path / "metrics.jsonl").exists()
    assert run.start(overrides=[f"init.from={complete_checkpoints(base.path / 'checkpoints')[1]}"]) == [0, 0], run.said
    assert "weights from step 9 of" in run.said


@pytest.mark.full
def test_ranks_that_see_other_origins_stop(recipe_file, whole, tmp_path):
    other = whole.copy(tmp_path / "other")
    shutil.rmtree(complete_checkpoints(other.path / "checkpoints")[0])
    run = Run(recipe_file, tmp_path)
    own = {rank: [f"init.from={path}"] for rank, path in enumerate((whole.path, other.path))}
    assert start(2, recipe_file, run.overrides, run.output, own=own).wait() == [2, 2]
    assert f"init.from = '{whole.path}' on rank 0, '{other.path}' on rank 1: all ranks must train the same" in run.said


def refused(recipe_file: Path, settings: list[str]) -> str:
    """Return the error of the checks before a start."""
    with pytest.raises(ValueError, match="^init.from = ") as error:
        preflight(load_recipe(recipe_file, settings), 2)
    return str(error.value)


@pytest.mark.full
def test_what_cannot_begin_a_run_is_named_with_a_way_out(recipe_file, whole, tmp_path):
    run = f"run_directory={tmp_path}/run"
    base = whole.copy(tmp_path / "base")
    begin = [run, f"init.from={base.path}"]
    preflight(load_recipe(recipe_file, begin), 2)

    said = refused(recipe_file, [run, f"init.from={tmp_path}"])
    assert said == (
        f"init.from = {tmp_path}: neither a run, a checkpoint nor a Hugging Face model; name a directory that "
        "`longring train` has written, or one with config.json"
    )

    said = refused(recipe_file, [*begin, "model.num_kv_heads=4", "model.num_heads=4", "model.rope_base=1e6"])
    assert "has model.num_kv_heads = 2, and this run has model.num_kv_heads = 4; set model.num_kv_heads = 2" in said
    assert said.endswith("or name a checkpoint of this model")
    preflight(load_recipe(recipe_file, [*begin, "model.num_kv_heads=2", "model.rope_base=1e6"]), 2)

    (base.path / "tokenizer.json").unlink()
    said = refused(recipe_file, begin)
    assert f"has no {base.path}/tokenizer.json; copy tokenizer.json of the data that it was trained on to there" in said
    shutil.copy(recipe_file.parent / "data" / "tokenizer.json", base.path)
    preflight(load_recipe(recipe_file, begin), 2)

    shutil.rmtree(base.path / "checkpoints")
    assert "no checkpoint yet; train first, with `longring train`" in refused(recipe_file, begin)


def test_settings_that_may_differ_from_those_of_the_weights():
    """RoPE, attention windows, and what training alone has; all others change what the weights are, or their use."""
    differ = {field.name for field in fields(ModelConfig) if field.name.startswith(MAY_DIFFER)}
    assert differ == {"rope_base", "rope_scaling", "layer_pattern", "window_tokens", "z_loss", "init_std"}


@pytest.mark.full
def test_data_of_another_tokenizer_is_refused(recipe_file, whole, tmp_path):
    """The vocabulary has as many tokens, with other ids."""
    settings = [f"run_directory={tmp_path}/run", f"init.from={whole.path}", f"data.directory={tmp_path}/data"]
    before = json.loads((whole.path / "tokenizer.json").read_text())
    vocabulary = before["model"]["vocab"]
    merged = [token for token in vocabulary if len(token) > 1 and not token.startswith("<|")]
    first, second = merged[10], merged[20]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(before))
    other = load_recipe(recipe_file, [*settings, f"data.tokenizer.path={tmp_path}/tokenizer.json"])
    prepare(other.data, Console(quiet=True))
    with pytest.raises(ValueError, match=r"has token .* with id \d+, and the tokenizer of .* with id \d+; ") as error:
        preflight(other, 2)
    assert "prepare the data with data.tokenizer.path = " in str(error.value)
    advised = str(error.value).rpartition("data.tokenizer.path = ")[2]
    again = load_recipe(recipe_file, [*settings, f"data.directory={tmp_path}/again", f"data.tokenizer.path={advised}"])
    prepare(again.data, Console(quiet=True))
    checked = preflight(again, 2)
    assert checked.origin == find_origin(again, checked.manifest)


@pytest.mark.full
def test_a_tokenizer_with_more_tokens_than_rows_is_refused(recipe_file, whole, tmp_path):
    """The marks of knots fit the padded rows of the embedding up to some number of chunks."""
    directory, begin = tmp_path / "data", [f"run_directory={tmp_path}/run", f"init.from={whole.path}"]
    begin += [f"data.directory={directory}", f"data.tokenizer.path={whole.path}/tokenizer.json"]
    for chunks, fits in ((8, False), (4, True)):
        recipe = load_recipe(recipe_file, [*begin, f"data.tokenizer.knot_chunks={chunks}"])
        prepare(recipe.data, Console(quiet=True))
        if fits:
            preflight(recipe, 2)
        else:
            with pytest.raises(ValueError, match=r"has 512 rows of embedding, and the 519 tokens of .* need 640"):
                preflight(recipe, 2)
        shutil.rmtree(directory)


def load_another(recipe_file: Path, checkpoint: Path) -> str:
    """Return the error of loading a checkpoint that has changed on rank 1 since rank 0 looked at it."""
    mesh = join(load_recipe(recipe_file).parallel, 1)
    sha256 = "0" * 64 if mesh.rank else sha256_of(checkpoint / "manifest.json")
    with pytest.raises(ValueError, match="mount the same directory on all machines, and start again") as error:
        load_origin(None, Origin(str(checkpoint), sha256, 0), mesh, moments=False)  # type: ignore[arg-type]
    return str(error.value)


@pytest.mark.full
def test_an_origin_that_ranks_see_differently_is_not_loaded(on_ranks, recipe_file, whole):
    last = complete_checkpoints(whole.path / "checkpoints")[0]
    first, second = on_ranks(2, load_another, recipe_file, last)
    assert first == second and "000000" in first
