"""Checkpoints on disk: completeness, damage and retention; and loading on another mesh than the one that saved."""

from __future__ import annotations

import json
import math
import re
import shutil
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.lanes import by_lane
from helpers.small_checkpoint import STATE, make_checkpoint, read_whole
from hypothesis import example, given
from hypothesis import strategies as st
from longring.data import files
from longring.launch import cli
from longring.launch.build import build_engine
from longring.launch.checkpoint.format import (
    CheckpointManifest,
    TrainState,
    check_trained_on,
    complete_checkpoints,
    find_damage,
    last_good_checkpoint,
    read_checkpoint_manifest,
)
from longring.launch.checkpoint.load import load_last_good
from longring.launch.checkpoint.retention import clear_leftovers, prune_checkpoints, steps_to_prune
from longring.launch.checkpoint.save import Saver
from longring.launch.checkpoint.tensors import write_safetensors
from longring.launch.config import load_recipe
from longring.launch.records import read_records
from longring.launch.run_directory import RunDirectory
from longring.launch.train import train
from longring.parallel.fragments import updates
from longring.parallel.mesh import join
from rich.console import Console
from safetensors.numpy import load_file


def test_a_manifest_describes_the_files(tmp_path):
    path = make_checkpoint(tmp_path, 7)
    manifest = read_checkpoint_manifest(path)
    assert manifest.state == TrainState(**{**STATE.__dict__, "step": 7})
    assert manifest.files["rank-00001.safetensors"].ranges == {"w": (4, 4)}
    assert manifest.num_bytes == sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert find_damage(path, manifest) is None


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "truncated": (truncate, r"rank-00001.safetensors: has [\d,]+ bytes, and the manifest says [\d,]+"),
    "one bit": (flip, r"rank-00001.safetensors: has SHA-256 \w{16}..., and the manifest says \w{16}..."),
    "gone": (Path.unlink, "rank-00001.safetensors: missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_a_file_is_named(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(files.time, "sleep", lambda _: None)
    path = make_checkpoint(tmp_path, 7)
    damage, message = DAMAGE[kind]
    damage(path / "rank-00001.safetensors")
    found = find_damage(path, read_checkpoint_manifest(path))
    assert re.search(message, found or "")


@given(data=st.data())
def test_any_change_to_a_manifest_is_noticed(tmp_path_factory, data):
    path = make_checkpoint(tmp_path_factory.mktemp("manifest"), 7)
    file = path / "manifest.json"
    text = file.read_text()
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != content[at]))
    content[at] = byte
    before = read_checkpoint_manifest(path)
    file.write_bytes(content)
    try:
        same = json.loads(content) == json.loads(text)  # a space in place of a newline, for example
    except ValueError:
        same = False
    if same:
        assert read_checkpoint_manifest(path) == before
    else:
        with pytest.raises(ValueError, match=re.escape(str(file))):
            read_checkpoint_manifest(path)


def test_only_complete_checkpoints_count_and_leftovers_are_cleared(tmp_path):
    assert complete_checkpoints(tmp_path / "none") == []
    assert last_good_checkpoint(tmp_path / "none") is None
    for step in (10, 100):
        make_checkpoint(tmp_path, step)
    for name in (
        "step-00000090.partial",
        "step-00000200.removed",
        "step-00000300.damaged",
        "notes",
        "step-old.partial",
    ):
        (tmp_path / name).mkdir()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000100", "step-00000010"]
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes",
        "step-00000010",
        "step-00000100",
        "step-00000300.damaged",
        "step-old.partial",
    ]
    truncate(tmp_path / "step-00000100" / "rank-00000.safetensors")
    found = last_good_checkpoint(tmp_path)
    assert found is not None
    assert found[0].name == "step-00000010"


@given(
    steps=st.sets(st.integers(0, 200), max_size=30),
    keep_last=st.integers(1, 10),
    keep_every=st.integers(0, 20),
)
@example(steps={0, 1}, keep_last=1, keep_every=0)
def test_retention_keeps_the_last_every_nth_and_imported_weights(steps, keep_last, keep_every):
    gone = set(steps_to_prune(steps, keep_last, keep_every))
    kept = steps - gone
    assert gone <= steps
    assert kept >= set(sorted(steps, reverse=True)[:keep_last])
    for step in gone:
        assert step > 0, "step 0 is imported weights"
        assert not keep_every or step % keep_every
        assert sum(other > step for other in kept) >= keep_last
    for step in kept:
        nth = keep_every and step % keep_every == 0
        assert sum(other > step for other in steps) < keep_last or nth or step == 0


def test_pruning_leaves_whole_checkpoints(tmp_path):
    for step in range(0, 80, 10):
        make_checkpoint(tmp_path, step)
    gone = prune_checkpoints(tmp_path, keep_last=2, keep_every_steps=30)
    assert [path.name[-2:] for path in gone] == ["10", "20", "40", "50"]
    assert sorted(path.name[-2:] for path in tmp_path.iterdir()) == ["00", "30", "60", "70"]
    assert [path.name[-2:] for path in prune_checkpoints(tmp_path, keep_last=1, keep_every_steps=0)] == ["30", "60"]
    assert (tmp_path / "step-00000000").is_dir(), "imported weights stay"


def test_the_safetensors_library_reads_the_files(tmp_path):
    tensors = {"a/weight": torch.randn(7), "b/exp_avg": torch.tensor([math.pi, -0.0, 1e-40])}
    size, _ = write_safetensors(tmp_path / "x.safetensors", tensors)
    read = load_file(tmp_path / "x.safetensors")
    assert size == (tmp_path / "x.safetensors").stat().st_size
    assert read.keys() == tensors.keys()
    assert all(read[name].tobytes() == tensor.numpy().tobytes() for name, tensor in tensors.items())


MESHES = {
    "1 rank": (1, ["parallel.zero_stage=0"]),
    "2 ranks, ZeRO 2": (2, ["parallel.zero_stage=2"]),
    "2 ranks, ZeRO 0": (2, ["parallel.zero_stage=0"]),
    "2 ranks, ZeRO 3": (2, ["parallel.zero_stage=3"]),
    "4 ranks, ZeRO 1": (4, ["parallel.zero_stage=1"]),
    "4 ranks, tensor 2, ZeRO 1": (4, ["parallel.zero_stage=1", "parallel.tensor=2"]),
    "2 ranks, tensor 2, ZeRO 3": (2, ["parallel.zero_stage=3", "parallel.tensor=2"]),
    "4 ranks, ZeRO 3": (4, ["parallel.zero_stage=3"]),
    **{
        f"2 ranks, ZeRO {stage} on the host": (
            2,
            [f"parallel.zero_stage={stage}", "parallel.zero.offload_optimizer=cpu"],
        )
        for stage in (1, 2, 3)
    },
}
MESHES["2 ranks, ZeRO 3 on the host"][1].append("parallel.zero.offload_param=cpu")


def accepted(manifest: CheckpointManifest, checkpoint: Path) -> None:
    """Let a start continue from any checkpoint."""


def save_again(recipe_file: Path, overrides: list[str], source: Path, target: Path) -> int:
    """Load the last checkpoint of `source` on this mesh and save it into `target`; return AdamW's count of updates."""
    recipe = load_recipe(recipe_file, overrides)
    mesh = join(recipe.parallel, 1)
    engine = build_engine(recipe, 500, mesh)
    manifest = last_good_checkpoint(source)
    assert manifest is not None
    loaded = load_last_good(engine, source, mesh, accepted)
    assert loaded is not None
    run = RunDirectory(target)
    saver = Saver(engine, run, mesh, recipe.train, 1)
    tensor = recipe.parallel.tensor
    saver.begin(TrainState(**{**loaded[1].__dict__, "tensor": tensor, "world_size": mesh.world_size}))
    assert saver.finish()
    saver.close()
    return updates(engine)


def save_that_is_not_published(recipe_file: Path, target: Path, max_failed: int) -> tuple[str, int]:
    """Save where rank 0 cannot write the manifest; return this rank's error, or whether it succeeded, and the files."""
    recipe = load_recipe(recipe_file)
    mesh = join(recipe.parallel, 1)
    saver = Saver(build_engine(recipe, 500, mesh), RunDirectory(target), mesh, recipe.train, max_failed)

    def full(partial: Path, manifest: CheckpointManifest) -> None:
        assert mesh.rank == 0
        raise OSError("No space left on device")

    saver._complete = full
    saver.begin(TrainState(**{**STATE.__dict__, "step": 7}))
    try:
        result = str(saver.finish())
    except OSError as error:
        result = f"{type(error).__name__}: {error}"
    saver.close()
    return result, len(list((target / "checkpoints").iterdir()))


@pytest.mark.full
def test_a_save_that_rank_0_cannot_publish_is_the_same_error_on_all_ranks(on_ranks, recipe_file, tmp_path):
    [(said, _)] = set(on_ranks(2, save_that_is_not_published, recipe_file, tmp_path, 1))
    assert said.startswith("CommonError: faults.max_failed_saves = 1: step 7 could not be saved, nor the 0 saves")
    assert on_ranks(2, save_that_is_not_published, recipe_file, tmp_path, 2) == [("False", 0)] * 2


FULL_MESHES = [
    ("float32", "2 ranks, ZeRO 3"),
    ("float32", "4 ranks, tensor 2, ZeRO 1"),
    ("bfloat16", "4 ranks, ZeRO 3"),
]
"""The dtypes and meshes of `make test`; the rest of the product is slow."""


@pytest.fixture(scope="module")
def trained(request, on_ranks, recipe_file, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run of six steps on four ranks with tensor parallelism: its directory and its overrides."""
    run = tmp_path_factory.mktemp("trained") / "run"
    overrides = ["parallel.tokens_per_rank=512", f"train.dtype={request.param}"]
    world, mesh = MESHES["4 ranks, tensor 2, ZeRO 1"]
    on_ranks(world, run_steps, recipe_file, [*overrides, *mesh, f"run_directory={run}"], 6)
    return run, overrides


def run_steps(recipe_file: Path, overrides: list[str], stop_after: int | None) -> None:
    train(load_recipe(recipe_file, overrides), Console(quiet=True), stop_after)


@pytest.mark.parametrize(
    ("trained", "mesh"),
    by_lane(
        product(["float32", "bfloat16"], MESHES),
        quick=[],
        slow=[case for case in product(["float32", "bfloat16"], MESHES) if case not in FULL_MESHES],
    ),
    indirect=["trained"],
)
def test_any_mesh_holds_the_same_weights_and_moments(on_ranks, recipe_file, trained, mesh, tmp_path):
    """The mesh that trained saves, another mesh loads and saves, and the first mesh loads and saves again."""
    run, overrides = trained
    exact = read_whole(run / "checkpoints" / "step-00000006")
    source = run / "checkpoints"
    for number, name in enumerate((mesh, "4 ranks, tensor 2, ZeRO 1")):
        world, settings = MESHES[name]
        target = tmp_path / str(number)
        assert on_ranks(world, save_again, recipe_file, [*overrides, *settings], source, target) == [6] * world
        source = target / "checkpoints"
        found = read_whole(source / "step-00000006")
        assert found.keys() == exact.keys()
        assert all(np.array_equal(found[key], exact[key]) for key in exact)
    assert any(np.abs(value).max() > 0 for key, value in exact.items() if key.endswith("exp_avg_sq"))


@pytest.mark.full
def test_padding_of_uneven_parts_is_not_saved(on_ranks, recipe_file, tmp_path):
    """36 elements over 8 ranks of ZeRO 3 are padded to 40; the checkpoint holds 36, which one rank reads."""
    shape = ["model.hidden_size=36", "model.num_heads=2", "model.num_kv_heads=2"]
    overrides = [*shape, "parallel.tokens_per_rank=256", "parallel.zero_stage=3", f"run_directory={tmp_path}/run"]
    on_ranks(8, run_steps, recipe_file, overrides, 2)
    source = tmp_path / "run" / "checkpoints"
    assert on_ranks(1, save_again, recipe_file, [*shape, "parallel.tokens_per_rank=512"], source, tmp_path) == [2]
    exact, found = read_whole(source / "step-00000002"), read_whole(tmp_path / "checkpoints" / "step-00000002")
    assert any(value.size == 36 for value in exact.values())
    assert found.keys() == exact.keys()
    assert all(np.array_equal(found[key], exact[key]) for key in exact)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(
            (4, ["parallel.tokens_per_rank=128"]),
            (2, ["parallel.tokens_per_rank=512", "parallel.zero_stage=3"]),
            id="rings of 4 to none",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (2, ["parallel.tokens_per_rank=512", "parallel.zero_stage=2"]),
            (4, ["parallel.tokens_per_rank=128"]),
            id="none to rings of 4",
            marks=pytest.mark.full,
        ),
        pytest.param(
            (4, ["parallel.tokens_per_rank=128"]),
            (4, ["parallel.tokens_per_rank=256", "parallel.tensor=2"]),
            id="rings of 4 to tensor 2 and rings of 2",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (4, ["parallel.tokens_per_rank=128", "parallel.cp.schedule=token_ring"]),
            (4, ["parallel.tokens_per_rank=128", "parallel.cp.schedule=ring", "parallel.zero_stage=0"]),
            id="TokenRing and ZeRO 1 to Ring and ZeRO 0",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_continues_on_another_mesh(on_ranks, recipe_file, tmp_path, before, after):
    """Twelve steps on one mesh, against six there and six on another: equal batches, losses equal up to rounding."""
    reference, moved = tmp_path / "whole", tmp_path / "moved"
    steps = ["train.steps=12", "train.checkpoint_every_steps=6"]
    on_ranks(before[0], run_steps, recipe_file, [*steps, *before[1], f"run_directory={reference}"], None)
    on_ranks(before[0], run_steps, recipe_file, [*steps, *before[1], f"run_directory={moved}"], 6)
    on_ranks(after[0], run_steps, recipe_file, [*steps, *after[1], f"run_directory={moved}"], None)
    ours, theirs = (read_records(run / "metrics.jsonl") for run in (moved, reference))
    assert [(step["step"], step["bucket"], step["tokens"]) for step in ours] == [
        (step["step"], step["bucket"], step["tokens"]) for step in theirs
    ]
    for key in ("loss", "grad_norm"):
        assert [step[key] for step in ours] == pytest.approx([step[key] for step in theirs], rel=2e-5)


def load_there(
    recipe_file: Path, overrides: list[str], directory: Path, data: str
) -> tuple[str, int, list[str]] | None:
    """Load the last good checkpoint; return its name, its step and the damage of later ones."""
    files.time = SimpleNamespace(sleep=lambda _: None)  # of this process alone
    recipe = load_recipe(recipe_file, overrides)
    mesh = join(recipe.parallel, 1)
    check = partial(check_trained_on, data=data)
    loaded = load_last_good(build_engine(recipe, 500, mesh), directory, mesh, check)
    return loaded and (loaded[0].name, loaded[1].step, loaded[2])


@pytest.fixture(scope="module")
def two_saves(on_ranks, recipe_file, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("two") / "run"
    overrides = ["train.checkpoint_every_steps=2", f"run_directory={run}"]
    on_ranks(2, run_steps, recipe_file, overrides, 4)
    return run


@pytest.mark.parametrize("kind", by_lane([*DAMAGE, "manifest"], quick=["one bit"]))
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_loaded(
    on_ranks, recipe_file, two_saves, tmp_path, kind
):
    directory = Path(shutil.copytree(two_saves / "checkpoints", tmp_path / "checkpoints"))
    last = directory / "step-00000004"
    data = read_checkpoint_manifest(last).state.data
    damage, message = DAMAGE.get(kind, (truncate, "manifest.json: damaged"))
    damage(last / ("manifest.json" if kind == "manifest" else "rank-00001.safetensors"))
    results = on_ranks(2, load_there, recipe_file, [], directory, data)
    assert [result[:2] for result in results] == [("step-00000002", 2)] * 2
    [named] = {tuple(result[2]) for result in results}
    assert re.search(f"step-00000004.*{message}", named[0])
    assert sorted(path.name for path in directory.iterdir()) == ["step-00000002", "step-00000004.damaged"]
    assert on_ranks(2, load_there, recipe_file, [], directory, data) == [("step-00000002", 2, [])] * 2


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(on_ranks, recipe_file, two_saves, tmp_path):
    directory = Path(shutil.copytree(two_saves / "checkpoints", tmp_path / "checkpoints"))
    for step in (2, 4):
        flip(directory / f"step-0000000{step}" / "rank-00000.safetensors")
    data = read_checkpoint_manifest(directory / "step-00000004").state.data
    advice = "bring back a copy, or name another run_directory to start from the first step"
    for _ in range(2):
        with pytest.raises(AssertionError, match=f"checkpoints: all are damaged: .*step-0000000[24].*{advice}"):
            on_ranks(2, load_there, recipe_file, [], directory, data)
        assert sorted(path.name for path in directory.iterdir()) == ["step-00000002", "step-00000004"]
    shutil.rmtree(directory / "step-00000002")
    shutil.copytree(two_saves / "checkpoints" / "step-00000002", directory / "step-00000002")
    for expected in (1, 0):  # the damaged one is put aside now, and found no more
        results = on_ranks(2, load_there, recipe_file, [], directory, data)
        assert [(name, step, len(damaged)) for name, step, damaged in results] == [("step-00000002", 2, expected)] * 2
    shutil.rmtree(directory)
    assert on_ranks(2, load_there, recipe_file, [], directory, data) == [None] * 2


def test_a_checkpoint_of_other_data_or_another_model_is_refused(on_ranks, recipe_file, two_saves):
    directory = two_saves / "checkpoints"
    with pytest.raises(AssertionError, match=r"trained on data whose manifest has SHA-256 .*manifest now has bbbb"):
        on_ranks(2, load_there, recipe_file, [], directory, "b" * 64)
    data = read_checkpoint_manifest(directory / "step-00000004").state.data
    with pytest.raises(
        AssertionError,
        match=r"of another model: blocks.*mlp.gate_up.weight has shape \[192, 64\] there and \[128, 64\] here",
    ):
        on_ranks(2, load_there, recipe_file, ["model.ffn_hidden_size=64"], directory, data)
    assert on_ranks(2, load_there, recipe_file, [], directory, data) == [("step-00000004", 4, [])] * 2


def refused_by_one_rank(recipe_file: Path, directory: Path) -> list[str]:
    """Return the errors of two loads in which rank 1 alone refuses the checkpoint."""
    recipe = load_recipe(recipe_file)
    mesh = join(recipe.parallel, 1)
    engine = build_engine(recipe, 500, mesh)
    said = []

    def check(manifest: CheckpointManifest, checkpoint: Path) -> None:
        if mesh.rank == 1:
            raise ValueError(f"checkpoint {checkpoint}: refused")

    for _ in range(2):
        try:
            load_last_good(engine, directory, mesh, check)
        except ValueError as error:
            said.append(str(error))
    return said


def test_a_checkpoint_that_one_rank_refuses_is_refused_by_all(on_ranks, recipe_file, two_saves):
    directory = two_saves / "checkpoints"
    text = f"checkpoint {directory}/step-00000004: refused"
    assert on_ranks(2, refused_by_one_rank, recipe_file, directory) == [[text] * 2] * 2


def test_checkpoints_are_listed_verified_and_pruned(capsys, recipe_file, tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.create(load_recipe(recipe_file))
    for step in (10, 20, 30, 40):
        make_checkpoint(run.checkpoints, step)
    for name in ("step-00000050.partial", "step-00000060.damaged", "step-best.damaged"):
        (run.checkpoints / name).mkdir()
    assert cli.main(["checkpoints", str(run.path)]) == 0
    listed = capsys.readouterr().out
    assert listed.count("whole") == 4
    rows = [tuple(line.split()) for line in listed.splitlines()]
    assert {("50", "partial"), ("60", "damaged")} < set(rows) and "best" not in listed
    flip(run.checkpoints / "step-00000040" / "rank-00000.safetensors")
    assert cli.main(["checkpoints", str(run.path)]) == 0, "without --verify only sizes are compared"
    assert cli.main(["checkpoints", str(run.path), "--verify", "--prune", "--keep-last", "2", "--keep-every", "7"]) == 1
    verified = capsys.readouterr().out
    assert "step-00000040/rank-00000.safetensors: has SHA-256" in verified
    # Step 40 is damaged: it does not count among the last two, and is kept.
    kept = ["step-00000020", "step-00000030", "step-00000040", "step-00000050.partial", "step-best.damaged"]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == kept
