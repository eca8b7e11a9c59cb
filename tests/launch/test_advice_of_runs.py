"""The advice of errors in the middle of a run works: it is carried out, and the run goes on."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.faulty import Run, start
from longring.data.files import sha256_of, sha256_of_json
from longring.data.read.batch_order import ORDER
from longring.launch import build
from longring.launch.checkpoint.format import read_checkpoint_manifest, write_checkpoint_manifest
from longring.launch.config import load_recipe
from longring.launch.grids.decide import decide_grids
from longring.launch.run_directory import RunDirectory
from longring.parallel.cp.attention import context_attention
from longring.parallel.cp.grid import CpGrid
from longring.parallel.mesh import join

FILE = "rank-00001.safetensors"


@pytest.fixture(scope="module")
def half(recipe_file, tmp_path_factory) -> Run:
    """A run with checkpoints of steps 6 and 8."""
    run = Run(recipe_file, tmp_path_factory.mktemp("half"))
    assert run.start(stop_after=8) == [0, 0], run.said
    return run


def without_a_range(checkpoint: Path) -> None:
    """Leave a parameter out of the manifest."""
    manifest = read_checkpoint_manifest(checkpoint)
    entry = manifest.files[FILE]
    ranges = dict(list(entry.ranges.items())[1:])
    files = {**manifest.files, FILE: replace(entry, ranges=ranges)}
    write_checkpoint_manifest(checkpoint, replace(manifest, files=files))


def of_no_format(checkpoint: Path) -> None:
    """Write a file that is no safetensors file, and its hash into the manifest."""
    (checkpoint / FILE).write_text("words")
    manifest = read_checkpoint_manifest(checkpoint)
    entry = replace(manifest.files[FILE], bytes=5, sha256=sha256_of(checkpoint / FILE))
    write_checkpoint_manifest(checkpoint, replace(manifest, files={**manifest.files, FILE: entry}))


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "a missing range": (without_a_range, r"checkpoint (\S+): lacks elements .*; remove it to resume from"),
    "no safetensors": (of_no_format, r"not a safetensors file: .*; remove (\S+) to resume from the checkpoint before"),
}


@pytest.mark.full
@pytest.mark.parametrize("wrong", WRONG)
def test_without_a_checkpoint_that_was_saved_wrong_the_run_continues_from_the_one_before(wrong, half, whole, tmp_path):
    spoil, advice = WRONG[wrong]
    run = half.copy(tmp_path)
    spoil(run.path / "checkpoints" / "step-00000008")
    for _ in range(2):
        assert run.start() == [2, 2]
        assert run.said.count("error:") == 1
    found = re.search(advice, run.said)
    assert found is not None, run.said
    assert Path(found[1]) == run.path / "checkpoints" / "step-00000008"
    shutil.rmtree(found[1])
    run.finish(whole)


@pytest.mark.full
def test_a_run_in_an_earlier_order_of_batches_ends_there_and_its_weights_begin_another(half, tmp_path):
    """Its checkpoints name no order, and their recipe has the weights of sources that earlier recipes had."""
    run = half.copy(tmp_path)
    for checkpoint in (run.path / "checkpoints").iterdir():
        content = json.loads((checkpoint / "manifest.json").read_text())
        del content["sha256"], content["state"]["order"]
        curriculum = content["state"]["recipe"]["curriculum"]
        del curriculum["shares"], curriculum["mix"]
        curriculum["weights"] = {}
        (checkpoint / "manifest.json").write_text(json.dumps({**content, "sha256": sha256_of_json(content)}))
    for _ in range(2):
        assert run.start() == [2, 2]
        assert run.said.count("error:") == 1
    last = run.path / "checkpoints" / "step-00000008"
    assert (
        f"checkpoint {last}: its steps have order 1 of batches, and this LongRing trains in order {ORDER}; " in run.said
    )
    advice = r"or name another run_directory and begin it with init\.from = '(\S+)'"
    found = re.search(advice, run.said)
    assert found is not None, run.said
    after = Run(half.recipe_file, tmp_path / "after", [f"init.from={found[1]}"])
    assert after.start(stop_after=1) == [0, 0], after.said
    assert f"weights from step 8 of {last}" in after.said


@pytest.mark.full
def test_after_too_many_steps_without_finite_gradients_a_lower_rate_trains(recipe_file, tmp_path):
    """The weights grow by a factor of 300,000 a step, until their products overflow."""
    settings = ["train.weight_decay=300", "train.warmup_steps=0", "faults.max_nonfinite_steps=3"]
    run = Run(recipe_file, tmp_path, settings)
    advice = "lower train.learning_rate in a new run_directory, or look at the sequences that the logs name"
    for _ in range(2):
        assert run.start(overrides=["train.learning_rate=1000"]) == [2, 2]
        assert run.said.count("error:") == 1 and advice in run.said
    for rank in (0, 1):
        assert "is not finite; sequences [[" in (run.path / "logs" / f"rank-0000{rank}.log").read_text()
    Run(recipe_file, tmp_path / "lower", settings).finish()


@pytest.mark.full
def test_a_first_start_that_waits_for_another_one_continues_its_run_when_given_again(half, whole, tmp_path):
    """Both have looked at an empty directory; the other one trains and ends while this one waits for the lock."""
    run = Run(half.recipe_file, tmp_path)
    directory = RunDirectory(run.path)
    directory.logs.mkdir(parents=True)
    with directory.held():
        waiting = start(2, run.recipe_file, run.overrides, run.output)
        while not (directory.log_file(0).exists() and directory.log_file(1).exists()):  # its checks are done
            assert all(process.is_alive() for process in waiting.processes), run.said
            time.sleep(0.05)
        shutil.copytree(half.path, run.path, dirs_exist_ok=True)
    assert waiting.wait() == [74, 74], run.said
    assert run.said.count("error:") == 1
    assert "another start has begun this run since this one looked; give the same command again" in run.said
    assert run.checkpoints == half.checkpoints
    run.finish(whole)


def guarded(recipe_file: Path, settings: list[str]) -> str:
    """Return the error of the check before the first step where TokenRing with the chosen kernels is wrong."""
    small = ["parallel.tokens_per_rank=256", "parallel.cp.schedule=token_ring"]
    recipe = load_recipe(recipe_file, [*small, *settings])
    mesh = join(recipe.parallel, recipe.max_context_parallel)

    def wrong(q, k, v, spec, group):
        out = context_attention(q, k, v, spec, group)
        return 1.5 * out if (spec.grid, spec.backend) == (CpGrid.token_ring(2), "auto") else out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "context_attention", wrong)
        lengths = recipe.data.lengths
        try:
            build.bucket_layouts(recipe, mesh, lengths, decide_grids(recipe, mesh, lengths))
        except ValueError as error:
            return str(error)
    return "passed"


def test_another_backend_or_schedule_passes_the_check_before_the_first_step(on_ranks, recipe_file):
    advice = "try another train.attention_backend, parallel.cp.schedule or parallel.cp.layout, and report this error"
    for said in on_ranks(2, guarded, recipe_file, []):
        assert advice in said
    for setting in ("train.attention_backend=torch_cpu", "parallel.cp.schedule=ring"):
        assert on_ranks(2, guarded, recipe_file, [setting]) == ["passed"] * 2
