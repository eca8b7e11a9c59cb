"""Evaluations during training: the run stays as it is to the bit, and they find what `longring evaluate` finds."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from helpers.faulty import Fault, start
from helpers.lanes import by_lane
from longring.data.format.manifest import open_prepared
from longring.launch.build import build_engine, open_layouts
from longring.launch.config import load_recipe
from longring.launch.evaluate import evaluate
from longring.launch.evaluation.in_training import evaluation_line
from longring.launch.evaluation.measure import Bound, CutShortError, Measurement
from longring.launch.metrics import MetricsWriter
from longring.launch.records import read_records
from longring.launch.report.state import Observer
from longring.launch.run_directory import RunDirectory
from longring.launch.train import train
from longring.parallel.mesh import join
from rich.console import Console
from safetensors.torch import load_file

EXACT = ("step", "tokens", "loss", "bucket", "cp", "learning_rate", "grad_norm")
COMMON = ["parallel.cp.topology=full_mesh", "train.steps=6", "train.checkpoint_every_steps=3"]
EVALUATED = [
    *("train.evaluate_every_steps=2", 'evaluate.tasks=["copy_text","needle_single_1"]', "evaluate.samples=1"),
    *("evaluate.context_sequences=1", "evaluate.short_tokens=256", "evaluate.max_tokens_per_bucket=512"),
]
DIVISIONS = {
    "zero 1, bf16": (4, ["parallel.zero_stage=1", "parallel.tokens_per_rank=128", "train.dtype=bfloat16"]),
    "zero 3, tensor of 2": (4, ["parallel.zero_stage=3", "parallel.tensor=2", "parallel.tokens_per_rank=256"]),
    "recomputed": (2, ["train.memory.activations=recompute_layer", "parallel.tokens_per_rank=256"]),
}


def trained(recipe_file: Path, overrides: list[str], *stops: int | None) -> None:
    """Train in several starts, and evaluate at the end."""
    recipe = load_recipe(recipe_file, overrides)
    for stop in stops:
        train(recipe, Console(quiet=True), stop)
    if recipe.train.evaluate_every_steps:
        evaluate(recipe, Console(quiet=True))


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the last checkpoint of six steps, by file and name."""
    files = sorted((run / "checkpoints" / "step-00000006").glob("*.safetensors"))
    return {f"{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_trained_alike(run: Path, other: Path) -> None:
    ours, theirs = ([[step[key] for key in EXACT] for step in read_records(r / "metrics.jsonl")] for r in (run, other))
    assert ours == theirs
    ours, theirs = tensors(run), tensors(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def measured(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("seconds", "time")}


@pytest.mark.parametrize(
    "division",
    by_lane(DIVISIONS, quick=[], slow=["zero 1, bf16", "zero 3, tensor of 2"]),
)
def test_evaluations_change_no_bit_of_a_run_and_equal_those_of_its_checkpoints(
    on_ranks, recipe_file, tmp_path, division
):
    ranks, overrides = DIVISIONS[division]
    runs = {name: tmp_path / name / "run" for name in ("plain", "evaluated")}
    for name, more in (("plain", []), ("evaluated", EVALUATED)):
        settings = [*COMMON, *overrides, *more, f"run_directory={runs[name]}"]
        # The evaluated run is resumed between two evaluations.
        on_ranks(ranks, trained, recipe_file, settings, *([3, None] if more else [None]))
    assert_trained_alike(*runs.values())

    records = read_records(runs["evaluated"] / "evaluations.jsonl")
    assert [record["step"] for record in records] == [2, 4, 6, 6]
    assert measured(records[2]) == measured(records[3]), "the last is that of `longring evaluate`"
    assert {entry["task"] for entry in records[0]["tasks"]} == {"copy_text", "needle_single_1"}
    assert records[0]["loss"] > records[1]["loss"] > records[2]["loss"]
    events = [event for event in read_records(runs["evaluated"] / "events.jsonl") if event["event"] == "evaluation"]
    assert [event["step"] for event in events] == [2, 4, 6]
    assert f"held-out loss {records[0]['loss']:.4f}" in events[0]["message"]
    state = Observer(RunDirectory(runs["evaluated"])).state()
    assert state.held_out == (6, records[2]["loss"]) and state.to_json()["held_out_loss"] == records[2]["loss"]
    assert (runs["evaluated"] / "metrics.jsonl").read_text().count('"evaluate"') == 2, (
        "in the step after, if there is one"
    )


def bounded(late_rank: int) -> list[str]:
    """Return the operations that this rank begins, of which one rank is late at the third."""
    begun: list[str] = []
    rank = torch.distributed.get_rank()
    bound = Bound(begun.append, 30.0, lambda: False, torch.device("cpu"))
    bound.begin()
    try:
        for operation in "abcdef":
            if operation == "c" and rank == late_rank:
                bound._ends = time.monotonic() - 1
            bound(operation)
    except CutShortError as error:
        return [*begun, str(error)]
    return begun


def test_ranks_end_an_evaluation_at_the_same_operation(on_ranks):
    for late in (0, 1):
        [ours, theirs] = on_ranks(2, bounded, late)
        assert ours == theirs
        assert ours[:-1] == ["a", "b", "c"]
        assert "train.evaluate_seconds = 30: passed before c; raise it, or lower evaluate.max_tokens" in ours[-1]


def cut_after_two_buckets(recipe_file: Path) -> tuple[list[int], dict[str, Any]]:
    """Return the buckets that have held-out sequences, and an evaluation that ends at the third of them."""
    recipe = load_recipe(recipe_file, EVALUATED)
    manifest = open_prepared(recipe.data.directory)
    mesh = join(recipe.parallel, recipe.max_context_parallel, 5)
    engine = build_engine(recipe, manifest.vocab_size, mesh)
    layouts = open_layouts(recipe, mesh, recipe.lengths, lambda _: None)
    lengths = [bucket.length for bucket in manifest.buckets("held_out") if bucket.sequences]

    def at(operation: str) -> None:
        if f"of bucket {lengths[2]}" in operation:
            raise CutShortError("too late")

    return lengths, Measurement.of(recipe, manifest, mesh, engine, layouts, at).measure()


def test_an_evaluation_that_is_cut_short_has_no_mean_over_buckets(on_ranks, recipe_file):
    [(lengths, found)] = on_ranks(1, cut_after_two_buckets, recipe_file)
    assert [entry["bucket"] for entry in found["buckets"]] == lengths[:2]
    assert found["cut_short"] == "too late"
    assert not {"loss", "unigram_loss", "tokens", "by_source", "by_document"} & found.keys()
    complete = f"{lengths[0]}, {lengths[1]}"
    assert evaluation_line(found).startswith(f"of all buckets only {complete} complete, so no mean after ")
    logged: dict[str, float] = {}
    writer = SimpleNamespace(_trackers=[SimpleNamespace(log=lambda _, values: logged.update(values))])
    MetricsWriter.write_evaluation(cast(MetricsWriter, writer), 4, found)
    assert logged.keys() == {f"held_out/{length}" for length in lengths[:2]}


def cut_short(recipe_file: Path, overrides: list[str]) -> None:
    for seconds in (1e-6, 600):
        recipe = load_recipe(recipe_file, [*overrides, f"train.evaluate_seconds={seconds}"])
        train(recipe, Console(quiet=True), 2 if seconds < 1 else 4)
    with pytest.raises(ValueError, match="no held-out sequence of .* is that short; raise it, or prepare other data"):
        train(load_recipe(recipe_file, [*overrides, "evaluate.max_tokens_per_bucket=1"]), Console(quiet=True))


@pytest.mark.slow
def test_an_evaluation_that_takes_too_long_is_left_out_and_training_goes_on(on_ranks, recipe_file, tmp_path):
    on_ranks(1, cut_short, recipe_file, [*COMMON, *EVALUATED, f"run_directory={tmp_path / 'run'}"])
    records, events = (read_records(tmp_path / "run" / name) for name in ("evaluations.jsonl", "events.jsonl"))
    found = [
        (event["step"], "no bucket is complete after 0 s; train.evaluate_seconds = 1e-06: passed" in event["message"])
        for event in events
    ]
    assert found == [(2, True), (2, False), (4, False)], "raised, the next start repeats what is missing"
    assert [record["step"] for record in records] == [2, 4]


@pytest.mark.slow
def test_a_signal_during_an_evaluation_ends_it_and_the_next_start_repeats_it(recipe_file, tmp_path):
    plain, run, output = tmp_path / "plain" / "run", tmp_path / "told" / "run", tmp_path / "output.txt"
    overrides = [*COMMON, "parallel.tokens_per_rank=256"]
    assert start(2, recipe_file, [*overrides, f"run_directory={plain}"], output).wait() == [0, 0], output.read_text()
    evaluated = [*overrides, *EVALUATED, f"run_directory={run}"]
    fault = Fault(1, "SIGTERM", step=4, operation="evaluating sequence")
    assert start(2, recipe_file, evaluated, output, [fault]).wait() == [75, 75], output.read_text()
    assert [record["step"] for record in read_records(run / "evaluations.jsonl")] == [2]
    assert start(2, recipe_file, evaluated, output).wait() == [0, 0], output.read_text()
    assert [record["step"] for record in read_records(run / "evaluations.jsonl")] == [2, 4, 6]
    assert_trained_alike(plain, run)
