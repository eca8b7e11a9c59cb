"""Runs whose shares follow the losses of their sources: measured, recorded and replayed exactly."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import textwrap
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.faulty import Fault, start
from helpers.lanes import by_lane
from helpers.plain_model import plain_losses
from helpers.small_checkpoint import read_whole
from longring.data.format.manifest import Manifest, open_prepared
from longring.data.prepare.prepare import prepare
from longring.data.read.mix import buckets_in_use
from longring.data.read.renewal import Renewal, held_out_sequences
from longring.data.read.shares import Cells
from longring.launch import cli
from longring.launch.commands.mix import show_mix
from longring.launch.config import load_recipe
from longring.launch.preflight import order_of, preflight
from longring.launch.recipe_change import check_change
from longring.launch.records import read_records
from longring.launch.renewals import append_renewal, read_renewals, renewal_steps
from longring.launch.run_directory import RunDirectory
from rich.console import Console

from .conftest import RECIPE

SOURCES = ("code", "digits", "words")
STEPS = 8
SETTINGS = [
    *(f"train.steps={STEPS}", "train.checkpoint_every_steps=1", "train.keep_checkpoints=20"),
    *("curriculum.cycles=4", "curriculum.mix=micro_batch", "curriculum.slot_tokens=512"),
    *("curriculum.renewal.rate=3", "curriculum.renewal.held_out_tokens=1500"),
    # The topology is named, since two runs that probe may choose different grids.
    *("parallel.tokens_per_rank=256", "parallel.cp.topology=full_mesh"),
]
EXACT = ("step", "loss", "bucket", "buckets", "grad_norm")


@pytest.fixture(scope="module")
def sources_file(tmp_path_factory) -> Path:
    """A recipe beside the prepared data of three sources, whose losses differ."""
    directory = tmp_path_factory.mktemp("renewals")
    draw = random.Random(5)
    code = Path(textwrap.__file__).with_name("argparse.py").read_text()
    for name in SOURCES:
        texts = []
        for number in range(60):
            size = draw.choice([200, 300, 900, 1800])
            found = {"code": code[1000 * number :], "digits": "".join(draw.choices("0123456789 ", k=size))}
            texts.append(found.get(name, " ".join(draw.choices(["the", "ring", "turns", "home"], k=size)))[:size])
        (directory / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    file = directory / "recipe.toml"
    one = RECIPE.format(directory=directory).splitlines()
    tables = "".join(f'[data.sources.{name}]\nkind = "json"\npath = "{directory}/{name}.jsonl"\n' for name in SOURCES)
    lines = [tables + line if line == "[curriculum]" else line for line in one if not line.startswith("source =")]
    file.write_text("\n".join(lines).replace("held_out_fraction = 0.1", "held_out_fraction = 0.2") + "\n")
    prepare(load_recipe(file).data, Console(quiet=True))
    return file


@pytest.fixture(scope="module")
def manifest(sources_file) -> Manifest:
    return open_prepared(sources_file.parent / "data")


def trained(
    file: Path, run: Path, *overrides: str, ranks: int = 2, faults: Sequence[Fault] = (), stop_after: int | None = None
) -> str:
    """Start a run on some ranks; return what they printed in one line, once all have ended well."""
    output = run.with_suffix(".txt")
    output.unlink(missing_ok=True)
    started = start(ranks, file, [*SETTINGS, f"run_directory={run}", *overrides], output, faults, stop_after)
    assert started.wait() == [0] * ranks, output.read_text()
    return " ".join(output.read_text().split())


@pytest.fixture(scope="module")
def whole(sources_file, tmp_path_factory) -> Path:
    """A run on two ranks that never stops."""
    run = tmp_path_factory.mktemp("whole") / "run"
    said = trained(sources_file, run)
    assert said.count("renewal: shares") == 3
    return run


def steps_of(run: Path) -> list[list]:
    return [[step[key] for key in EXACT] for step in read_records(run / "metrics.jsonl")]


def renewals_of(run: Path) -> list[tuple[int, dict[str, float]]]:
    return [(record["step"], record["losses"]) for record in read_records(run / "renewals.jsonl")]


@pytest.mark.full
def test_a_run_that_stops_where_its_shares_are_renewed_equals_one_that_never_stopped(sources_file, whole, tmp_path):
    """Starts end after the steps of two renewals, and the next starts measure from the weights of the checkpoints."""
    run = tmp_path / "run"
    for steps in (2, 4):
        trained(sources_file, run, stop_after=steps)
        assert [step for step, _ in renewals_of(run)] == list(range(2, steps, 2))
    trained(sources_file, run)
    assert renewals_of(run) == renewals_of(whole)
    assert steps_of(run) == steps_of(whole)


DIVISIONS = {
    "2 ranks": (2, []),
    "4 ranks in rings": (4, ["parallel.tokens_per_rank=128"]),
    "4 ranks, tensor-parallel, ZeRO 3": (4, ["parallel.tensor=2", "parallel.zero_stage=3"]),
}


@pytest.mark.parametrize("division", by_lane(DIVISIONS, quick=[], slow=["4 ranks, tensor-parallel, ZeRO 3"]))
def test_a_run_resumed_after_a_renewal_trains_the_same_batches(sources_file, manifest, whole, tmp_path, division):
    """The last checkpoint is of step 3, and the renewal after step 4 is on record when the start continues."""
    run, (ranks, overrides) = tmp_path / "run", DIVISIONS[division]
    trained(sources_file, run, stop_after=5)
    for step in (4, 5):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    trained(sources_file, run, *overrides, ranks=ranks)

    ours, theirs = renewals_of(run), renewals_of(whole)
    assert [step for step, _ in ours] == [2, 4, 6], "what is on record is not measured again"
    assert ours[:2] == theirs[:2]
    assert ours[2][1] == pytest.approx(theirs[2][1], rel=1e-5)
    assert (ours == theirs) == (division == "2 ranks")
    if division == "2 ranks":
        assert steps_of(run) == steps_of(whole)
    # Equal batches: the loss of every bucket of every step, and the ledger.
    for ours, theirs in zip(*(read_records(one / "metrics.jsonl") for one in (run, whole)), strict=True):
        assert ours["buckets"].keys() == theirs["buckets"].keys()
        for length, bucket in ours["buckets"].items():
            assert bucket["targets"] == theirs["buckets"][length]["targets"]
            assert bucket["loss"] == pytest.approx(theirs["buckets"][length]["loss"], rel=1e-5)
    assert json.loads((run / "trained.json").read_text()) == json.loads((whole / "trained.json").read_text())
    assert_losses_are_those_of_plain_pytorch(manifest, sources_file, run)


def assert_losses_are_those_of_plain_pytorch(manifest: Manifest, file: Path, run: Path) -> None:
    """Compare every renewal of a run with the weights of the checkpoint of its step, in fp64."""
    recipe = load_recipe(file, SETTINGS)
    cells = Cells.of(buckets_in_use(manifest, recipe.curriculum))
    for step, losses in renewals_of(run):
        checkpoint = run / "checkpoints" / f"step-{step:08d}"
        weights = {
            name.removesuffix("/weight"): torch.from_numpy(value).double()
            for name, value in read_whole(checkpoint).items()
            if name.endswith("/weight")
        }
        found: dict[str, list[np.ndarray]] = {name: [] for name in SOURCES}
        for bucket, numbers in held_out_sequences(manifest, cells, recipe.curriculum.renewal):
            ends = np.cumsum([part.sequences for part in bucket.parts])
            rows = torch.from_numpy(manifest.reader(bucket).read(numbers)).long()
            of_rows = plain_losses(weights, rows, recipe.model, vocab_size=manifest.vocab_size).numpy()
            for number, row in zip(numbers, of_rows, strict=True):
                found[SOURCES[np.searchsorted(ends, number, side="right")]].append(row)
        expected = {name: np.concatenate(rows).mean() for name, rows in found.items()}
        assert all(sum(map(len, rows)) <= 1500 for rows in found.values())
        assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.full
def test_shares_follow_the_losses_and_the_ledger_follows_the_shares(sources_file, manifest, whole):
    recipe = load_recipe(sources_file, SETTINGS)
    renewals = read_renewals(whole / "renewals.jsonl", str(RunDirectory(whole).run_id()))
    assert [renewal.step for renewal in renewals] == list(renewal_steps(recipe)) == [2, 4, 6]
    order, untouched = order_of(manifest, recipe, renewals), order_of(manifest, recipe)
    ledger = json.loads((whole / "trained.json").read_text())["cells"]
    assert [cell["tokens"] for cell in ledger] == [cell.tokens for cell in order.trained(STEPS)]
    # The recipe's own shares hold to the first renewal; from there on the source with the highest loss gains.
    losses = {name: sum(renewal.losses[name] for renewal in renewals) for name in SOURCES}
    lowest, _, highest = sorted(SOURCES, key=lambda name: losses[name])
    gained: Counter[str] = Counter()
    for now, before in zip(order.trained(STEPS), untouched.trained(STEPS), strict=True):
        gained[now.source] += now.tokens - before.tokens
    assert gained[highest] > 0 > gained[lowest]
    first = order.first_difference(untouched, STEPS)
    assert first is not None and 2 < first <= 6, "the steps before the first renewal are those of the recipe"


@pytest.mark.full
def test_a_plan_shows_the_shares_until_the_first_renewal_and_a_report_those_after_it(sources_file, whole, tmp_path):
    console = Console(width=80, record=True, quiet=False, file=io.StringIO())
    show_mix(load_recipe(sources_file, SETTINGS), console, None)
    assert "Shares until the first renewal; then they follow the held-out losses." in " ".join(
        console.export_text().split()
    )
    assert cli.main(["report", str(whole), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "Shares by source" in page
    assert re.search(r"shares (\w+ [0-9.]+% \(loss [0-9.]+\)(, )?){3}", page), "each renewal is an event"


@pytest.mark.full
def test_after_a_rewind_the_renewals_on_record_hold(sources_file, tmp_path):
    """The loss of step 7 is a spike: the run returns to step 5 and comes to the renewal after step 6 again."""
    spikes = ["faults.spike_deviations=4", "faults.spike_window_steps=4", "train.checkpoint_every_steps=5"]
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    (run / "renewals.jsonl").write_text('{"step": 2}\n')  # of a start that was killed before its first checkpoint
    at_7 = [Fault(rank, "times 3", step=7) for rank in (0, 1)]
    said = trained(sources_file, run, *spikes, faults=at_7)
    assert "back to step 5, leaving out steps [7]" in said
    assert [step for step, _ in renewals_of(run)] == [2, 4, 6]
    assert said.count("renewal: shares") == 3, "what is on record is not measured again"
    outcomes = [step["outcome"] for step in read_records(run / "metrics.jsonl")]
    assert outcomes == ["good"] * 6 + ["left out", "good"]


DAMAGES = {
    "a digit": "line 1 is not as it was written, .*; bring a copy of the file back, or name another run_directory",
    "no record": "line 2 is not as it was written",
    "a line gone": "lacks the losses after step 2, from which the batches up to step 8 follow; bring a copy",
    "all gone": "lacks the losses after step 2",
}


@pytest.mark.full
@pytest.mark.parametrize("change", DAMAGES)
def test_records_that_are_damaged_or_missing_are_refused(sources_file, whole, tmp_path, change):
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(whole, run.path)
    recipe = load_recipe(sources_file, [*SETTINGS, f"run_directory={run.path}"])
    lines = run.renewals_file.read_text().splitlines(keepends=True)
    changed = {
        "a digit": [lines[0].replace('"step": 2', '"step": 3'), *lines[1:]],
        "no record": [lines[0], "{\n", *lines[1:]],
        "a line gone": lines[1:],
        "all gone": [],
    }
    run.renewals_file.write_text("".join(changed[change]))
    with pytest.raises(ValueError, match=rf"renewals\.jsonl: {DAMAGES[change]}"):
        preflight(recipe, 2)
    shutil.copy(whole / "renewals.jsonl", run.renewals_file)
    with run.renewals_file.open("a") as file:
        file.write('{"time": "cut sh')  # by a crash while a line was written
    assert len(preflight(recipe, 2).renewals) == 3
    preflight(load_recipe(sources_file, [*SETTINGS, f"run_directory={tmp_path / 'new'}"]), 2)


@pytest.mark.full
def test_the_records_of_another_run_are_refused(whole):
    advice = "bring the file of this run back, or name another run_directory"
    with pytest.raises(ValueError, match=rf"renewals\.jsonl: line 1 is of run \w+, and the run is f+; {advice}"):
        read_renewals(whole / "renewals.jsonl", "f" * 32)


def test_losses_that_cannot_be_recorded_are_told_with_a_way_out(tmp_path):
    file, renewal = tmp_path / "run" / "renewals.jsonl", Renewal(4, {"code": 2.5, "words": 1.25})
    advice = "make room, or bring the directory back, and the same command continues from the last checkpoint"
    with pytest.raises(OSError, match=rf"the losses after step 4 cannot be recorded: No such file .*; {advice}"):
        append_renewal(file, "1" * 32, renewal, {})
    file.parent.mkdir()
    append_renewal(file, "1" * 32, renewal, {})
    assert read_renewals(file, "1" * 32) == (renewal,)


@pytest.mark.full
def test_a_change_of_the_rule_is_judged_by_the_steps_done(sources_file, whole):
    def check(change: str) -> None:
        preflight(load_recipe(sources_file, [*SETTINGS, f"run_directory={whole}", f"curriculum.renewal.{change}"]), 2)

    for change, message in {
        "rate=2": r"rate = 2\.0: was 3\.0 in the 8 steps done, and step \d would have had a batch",
        "rate=0": r"rate = 0\.0: was 3\.0 in the 8 steps done, and step \d would have had a batch",
        "graph={code={words=1}}": r"graph\.code\.words = 1\.0: was unset .* set it back to unset",
    }.items():
        with pytest.raises(ValueError, match=message):
            check(change)
    check("held_out_tokens=700")  # only measurements to come differ
    check("window=4")  # there were three


@pytest.mark.full
def test_shares_that_did_not_follow_the_losses_cannot_begin_to_in_the_past(sources_file, manifest):
    before, now = (load_recipe(sources_file, [*SETTINGS, f"curriculum.renewal.rate={rate}"]) for rate in (0, 0.5))
    message = r"rate = 0\.5: was 0\.0 in the 3 steps done, and step 3 would have followed losses that were not measured"
    with pytest.raises(ValueError, match=rf"{message}; set it back to 0\.0, or name"):
        check_change(before, now, 3, partial(order_of, manifest))
    check_change(before, before, 3, partial(order_of, manifest))
    check_change(before, now, 2, partial(order_of, manifest))  # the first cycle has ended, and no step came after it
