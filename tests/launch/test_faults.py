"""Every fault ends in a clear message, and the same command continues from the last good state."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from helpers.faulty import BATCH_TOKENS, Fault, Run, assert_equal, start
from helpers.lanes import by_lane
from helpers.ranks import variables_of
from helpers.small_checkpoint import STATE
from hypothesis import given
from hypothesis import strategies as st
from longring.launch.checkpoint.format import complete_checkpoints, find_damage, read_checkpoint_manifest
from longring.launch.config import FaultsConfig
from longring.launch.errors import GO_ON_LATER
from longring.launch.loss_watch import LossWatch
from longring.launch.metrics import MetricsWriter, StepMetrics
from longring.launch.ranks import watchdog
from longring.launch.ranks.watchdog import Position, diagnosis
from longring.launch.records import read_records
from longring.launch.run_directory import RunDirectory
from rich.console import Console
from safetensors.torch import load_file


@pytest.fixture
def run(recipe_file, tmp_path) -> Run:
    return Run(recipe_file, tmp_path)


@pytest.mark.parametrize("name", by_lane(["SIGTERM", "SIGUSR1"], quick=["SIGTERM"]))
def test_a_signal_to_one_rank_stops_all_ranks_after_the_same_step(run, whole, name):
    """One rank gets the signal within a step; both save after this step, which is not a multiple of three."""
    assert run.start(Fault(1, name, step=5, operation="forward")) == [GO_ON_LATER] * 2
    assert complete_checkpoints(run.path / "checkpoints")[0].name == "step-00000005"
    assert "saved; the same command continues the run" in run.said
    assert run.events[-1]["event"] == "stopped"
    run.finish(whole)


KILLED = {
    "in a step": Fault(1, "SIGKILL", step=8, operation="forward"),
    "rank 0 in a collective": Fault(0, "SIGKILL", step=4, operation="summing"),
    "while it writes": Fault(1, "SIGKILL", chunk=60),
    "rank 0 while it writes the second": Fault(0, "SIGKILL", chunk=40),
}


@pytest.mark.full
@pytest.mark.parametrize("fault", KILLED.values(), ids=KILLED)
def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(run, whole, fault):
    statuses = run.start(fault)
    assert statuses[fault.rank] == -9
    assert statuses[1 - fault.rank] == GO_ON_LATER
    # A rank that dies while it writes is missed by a collective, or within attention.
    in_collective = "lost its connection to another rank at step" in run.said
    if in_collective:
        assert "the cause is the error of that rank, or the signal that ended it." in run.said
    assert in_collective or "is gone or does not answer; see the log of global rank 1" in run.said or fault.rank == 0
    for path in complete_checkpoints(run.path / "checkpoints"):
        assert find_damage(path, read_checkpoint_manifest(path)) is None
    run.finish(whole)
    assert run.checkpoints == ["step-00000006", "step-00000009", "step-00000012"]


@pytest.mark.full
@pytest.mark.parametrize("action", ["hang", "SIGSTOP"])
def test_a_hang_is_reported_and_ended(run, whole, action):
    fault = Fault(1, action, step=5, operation="reading micro-batch 1")
    run_it = start(2, run.recipe_file, [*run.overrides, "faults.hang_minutes=0.05"], run.output, [fault])
    run_it.processes[0].join(60)
    assert run_it.processes[0].exitcode == GO_ON_LATER
    run_it.end()
    if action == "hang":
        assert "rank 1 hangs at step 5, reading micro-batch 1;" in run.said
    else:
        assert "rank 1 left no report (stopped, or its node is gone)" in run.said
    assert "the others wait: rank 0 at step 5, " in run.said
    assert run.events[-1]["event"] == "hang"
    assert "launch/train.py" in (run.path / "logs" / "rank-00000.hang.stacks").read_text()
    run.finish(whole)


STAGES = {
    **{f"zero{stage}": [f"parallel.zero_stage={stage}"] for stage in range(4)},
    "zero0-bf16": ["train.dtype=bfloat16", "parallel.zero_stage=0"],
}


@pytest.mark.parametrize("stage", by_lane(STAGES, quick=["zero1"]))
def test_a_step_without_finite_gradients_changes_nothing_on_any_rank(recipe_file, tmp_path, stage):
    run = Run(
        recipe_file,
        tmp_path,
        [*STAGES[stage], "train.checkpoint_every_steps=1", "train.steps=4", "train.warmup_steps=0"],
    )
    assert run.start(Fault(1, "times nan", step=3)) == [0, 0]
    assert run.outcomes == {3: "non-finite"}
    saved = {path.name: path for path in complete_checkpoints(run.path / "checkpoints")}
    manifests = {name: read_checkpoint_manifest(path) for name, path in saved.items()}
    assert [m.state.updates for m in manifests.values()] == [3, 2, 2]
    files = list(manifests["step-00000003"].files)
    two, three, four = ([load_file(saved[f"step-0000000{step}"] / name) for name in files] for step in (2, 3, 4))
    for before, after in zip(two, three, strict=True):
        assert all(before[key].equal(after[key]) for key in before)
    assert not all(two[-1][key].equal(four[-1][key]) for key in two[-1])
    steps = read_records(run.path / "metrics.jsonl")
    assert [step["tokens"] // BATCH_TOKENS for step in steps] == [1, 2, 2, 3]
    assert steps[2]["loss"] is None
    assert "step 3, step skipped: gradients are not finite" in run.said
    assert "1 of the 4 steps changed no weights" in run.said
    for rank in (0, 1):
        assert "step 3 is not finite; sequences [[" in (run.path / "logs" / f"rank-0000{rank}.log").read_text()
    run.finish()


@pytest.mark.full
def test_too_many_such_steps_stop_the_run_on_all_ranks(run, whole):
    faults = [Fault(1, "times inf", step=step) for step in range(5, 12)]
    assert run.start(*faults, overrides=["faults.max_nonfinite_steps=3"]) == [2, 2]
    assert run.said.count("error:") == 1
    assert "error: faults.max_nonfinite_steps = 3: 3 consecutive steps had gradients that are not finite" in run.said
    assert "the last of them step 7" in run.said
    # In the checkpoint of step 6 two of them are done: skipped steps are not trained later.
    run.finish()
    assert run.outcomes == {5: "non-finite", 6: "non-finite"}


SPIKES = ["faults.spike_deviations=4", "faults.spike_window_steps=4", "faults.spike_skip_steps=2"]
SPIKE_AT_8 = [Fault(rank, "times 3", step=8) for rank in (0, 1)]


@pytest.fixture(scope="module")
def rewound(recipe_file, tmp_path_factory) -> Run:
    """A run whose loss at step 8 is always a spike: it returns to step 6 and continues without steps 7 and 8."""
    run = Run(recipe_file, tmp_path_factory.mktemp("rewound"), SPIKES)
    assert run.start(*SPIKE_AT_8) == [0, 0]
    return run


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_rewind_restores_all_weights(recipe_file, tmp_path, rewound, stage):
    """Under each ZeRO stage, in the middle of a run, the losses equal those of ZeRO 1 up to rounding."""
    run = Run(recipe_file, tmp_path, [*SPIKES, f"parallel.zero_stage={stage}"])
    assert run.start(*SPIKE_AT_8) == [0, 0]
    ours, theirs = ([step["loss"] for step in read_records(r.path / "metrics.jsonl")] for r in (run, rewound))
    assert ours[:6] + ours[8:] == pytest.approx(theirs[:6] + theirs[8:], rel=1e-5)
    run.finish()


@pytest.mark.full
def test_a_spike_is_undone_and_its_batches_left_out(rewound, whole):
    run = rewound
    assert run.outcomes == {7: "left out", 8: "left out"}
    assert [event["event"] for event in run.events] == ["spike"]
    assert "back to step 6, leaving out steps [7, 8]" in run.said
    assert run.metrics[:6] == whole.metrics[:6]
    assert [step["tokens"] // BATCH_TOKENS for step in read_records(run.path / "metrics.jsonl")] == [
        1,
        2,
        3,
        4,
        5,
        6,
        6,
        6,
        7,
        8,
        9,
        10,
    ]
    assert run.metrics[8] != whole.metrics[8]
    state = read_checkpoint_manifest(complete_checkpoints(run.path / "checkpoints")[0]).state
    assert state.skipped == (7, 8)
    assert state.updates == 10
    last = [step["loss"] for step in read_records(run.path / "metrics.jsonl")][-4:]
    assert list(state.recent_losses) == last, "the next start detects a spike from the same losses"
    run.finish()


@pytest.mark.full
def test_a_step_left_out_changes_nothing_and_is_counted_once(recipe_file, tmp_path, rewound):
    """Step 7 changes no weights and is then left out: the steps after the rewind equal those of any other rewind."""
    run = Run(recipe_file, tmp_path, SPIKES)
    assert run.start(*(Fault(rank, "times nan", step=7) for rank in (0, 1)), *SPIKE_AT_8) == [0, 0]
    assert [event["event"] for event in run.events] == ["step skipped", "spike"]
    assert run.outcomes == {7: "left out", 8: "left out"}
    assert run.metrics[8:] == rewound.metrics[8:]
    assert_equal(run.saved(), rewound.saved())
    state = read_checkpoint_manifest(complete_checkpoints(run.path / "checkpoints")[0]).state
    assert state.skipped == (7, 8)
    run.finish()


@pytest.mark.full
def test_a_spike_before_the_first_checkpoint_and_too_many_of_them(recipe_file, tmp_path):
    settings = ["faults.spike_deviations=1", "faults.spike_window_steps=2", "faults.max_rewinds=1"]
    run = Run(recipe_file, tmp_path, [*settings, "train.checkpoint_every_steps=20"])
    faults = [Fault(rank, "times 3", step=step) for rank in (0, 1) for step in (3, 6)]
    assert run.start(*faults) == [2, 2]
    assert run.outcomes == {3: "spike", 6: "spike"}, "there was no checkpoint to return to"
    assert "error: faults.max_rewinds = 1: step 6 with loss" in run.said
    run.finish()  # from step 0, since nothing was saved
    assert run.outcomes == {}


@pytest.mark.full
def test_a_checkpoint_written_during_training_has_the_state_of_its_step(run, whole):
    """The disk of rank 1 sometimes takes a second, in which training continues and rank 0 has written its file."""
    pauses = [Fault(1, "pause", chunk=chunk) for chunk in range(5, 400, 40)]
    assert run.start(*pauses) == [0, 0]
    assert not (run.path / "events.jsonl").exists()
    run.finish(whole)
    for number in (1, 2):
        assert_equal(run.saved(number), whole.saved(number))


@pytest.mark.full
def test_a_full_disk_is_reported_and_the_next_save_is_tried(run, whole):
    """The files of rank 1 at steps 3 and 9 are /dev/full: two failed saves, but not consecutive ones."""
    partials = [run.path / "checkpoints" / f"step-0000000{step}.partial" for step in (3, 9)]
    assert run.start(stop_after=1) == [0, 0]
    traps = [fault for partial, step in zip(partials, (2, 8), strict=True) for fault in lay_trap(partial, step)]
    assert run.start(*traps, overrides=["faults.max_failed_saves=2"]) == [0, 0]
    for step in (3, 9):
        assert f"warning: rank 1 could not save step {step}: [Errno 28] No space left on device" in run.said
    assert [event["event"] for event in run.events] == ["save failed"] * 2
    names = [path.name for path in complete_checkpoints(run.path / "checkpoints")]
    assert names == ["step-00000012", "step-00000006", "step-00000001"]
    assert not any(partial.exists() for partial in partials)
    run.finish(whole)


@pytest.mark.full
def test_a_disk_that_stays_full_stops_the_run(run, whole):
    partial = run.path / "checkpoints" / "step-00000006.partial"
    statuses = run.start(*lay_trap(partial, 5), overrides=["faults.max_failed_saves=1"])
    assert statuses == [74, 74]
    assert run.checkpoints == ["step-00000003"]
    assert "faults.max_failed_saves = 1: step 6 could not be saved, nor the 0 saves before it" in run.said
    assert run.said.count("warning: ") == 1, "only the rank that failed warns"
    run.finish(whole)


def test_metrics_that_cannot_be_written_are_reported_with_their_directory(tmp_path):
    writer = MetricsWriter(RunDirectory(tmp_path), [], 0, 10, Console(quiet=True))
    writer._file = Path("/dev/full").open("w")  # noqa: SIM115 (closing it would raise again)
    zeros: dict[str, Any] = {field.name: 0 for field in fields(StepMetrics)} | {"step": 7, "outcome": "good"}
    with pytest.raises(OSError, match=f"step 7: cannot be recorded in {tmp_path}: .*No space left on device"):
        writer.write(StepMetrics(**zeros))


def lay_trap(partial: Path, step: int) -> list[Fault]:
    """Return a fault that fills the disk during the run, since a start deletes leftovers."""
    return [Fault(1, f"full {partial}/rank-00001.safetensors", step=step, operation="summing")]


@pytest.mark.full
def test_a_shard_that_goes_away_is_named_by_the_rank_that_needs_it(recipe_file, run, whole):
    data = Path(shutil.copytree(recipe_file.parent / "data", run.path.parent / "data"))
    settings = [f"data.directory={data}", "loader.workers=0"]
    statuses = run.start(Fault(0, f"remove {data}/**/train*.tar", step=0, operation="building"), overrides=settings)
    assert 74 in statuses
    assert "cannot read its rows of step" in run.said
    assert ".tar" in run.said
    shutil.rmtree(data)
    run.finish(whole)


@pytest.mark.full
def test_a_clock_that_jumps_changes_nothing(run, whole):
    settings = ["faults.hang_minutes=0.2"]
    faults = [Fault(rank, "clock", step=3, operation="reading") for rank in (0, 1)]
    assert run.start(*faults, overrides=settings) == [0, 0]
    run.finish(whole)


@pytest.mark.full
def test_after_a_damaged_checkpoint_the_run_continues_from_the_one_before(run, whole):
    assert run.start(stop_after=8) == [0, 0]
    file = run.path / "checkpoints" / "step-00000008" / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-8] + b"\0" * 8)
    assert run.start() == [0, 0]
    assert "damaged: " in run.said
    assert "step-00000008/rank-00001.safetensors: has SHA-256" in run.said
    assert "going back to step-00000006" in run.said
    assert [event["event"] for event in run.events] == ["damaged checkpoint"]
    run.finish(whole)


BLOCKED = """
import ctypes, sys, threading
from pathlib import Path
import torch.distributed as dist
from longring.launch.ranks import watchdog
from longring.launch.run_directory import RunDirectory

def dump():
    print("dumps", flush=True)
    if sys.argv[2] == "blocks":
        ctypes.PyDLL(None).pause()  # never returns, and no other thread of Python runs meanwhile
    released.set()
    return b""

released = threading.Event()
dist.is_initialized, dist.get_backend = lambda: True, lambda: "nccl"
watchdog.torch._C._distributed_c10d._dump_nccl_trace = dump
watchdog.BLOCKED_S = 1.0
run = RunDirectory(sys.argv[1])
run.logs.mkdir()
with watchdog.Watchdog(run, 0, 1, 0.4) as clock:
    released.wait()
    clock.alive()
if sys.argv[2] == "returns":
    threading.Event().wait(3)  # longer than the time after which a blocked process ends
"""


def test_the_rank_that_tells_of_a_hang_ends_before_the_others(tmp_path, monkeypatch):
    """Its connections break when another rank ends, and it would end as after a lost peer, without a word."""
    run, ended = RunDirectory(tmp_path), []
    run.logs.mkdir()
    for name, value in variables_of(0, 2).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(watchdog, "faulthandler", MagicMock())  # no timer in the process of the tests
    monkeypatch.setattr(watchdog.Watchdog, "_exit", lambda self: ended.append(self._rank))
    ranks = [watchdog.Watchdog(run, rank, 2, 3.0) for rank in range(2)]
    monkeypatch.setattr(watchdog.time, "sleep", lambda _: ranks[0]._end())
    for rank in ranks:
        rank._report()
    ranks[1]._end()
    assert ended == [0, 1]
    assert [event["event"] for event in read_records(run.events_file)] == ["hang"]


@pytest.mark.full
@pytest.mark.parametrize(("dump", "status"), [("blocks", 1), ("returns", 0)])
def test_a_report_that_blocks_does_not_keep_a_process_alive(tmp_path, dump, status):
    command = [sys.executable, "-c", BLOCKED, str(tmp_path), dump]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (status, "dumps\n"), ended.stderr
    assert ("_leave_traces" in ended.stderr) == (dump == "blocks")


def test_the_watchdog_names_the_rank_that_is_behind():
    at = {rank: Position(40, 7, "summing over the ranks") for rank in range(12)}
    stacks = "logs/*.hang.stacks has the stacks of each"
    assert diagnosis(at, 600).endswith(f"all ranks are at step 7, summing over the ranks; {stacks}")
    behind = {**at, 3: Position(38, 7, "reading micro-batch 0 of bucket 64")}
    said = diagnosis(behind, 600)
    assert said.startswith(
        "no progress for 600 s: rank 3 hangs at step 7, reading micro-batch 0 of bucket 64; the others"
    )
    assert "ranks 0, 1, 2, 4, 5, 6, 7, 8 and 3 more at step 7, summing" in said
    assert "rank 5 left no report" in diagnosis({**at, 5: None}, 600)


@given(
    losses=st.lists(st.floats(0.1, 20), min_size=1, max_size=40),
    window=st.integers(2, 10),
    deviations=st.floats(0.5, 10),
)
def test_a_spike_is_detected_from_the_losses_before_it(losses, window, deviations):
    config = FaultsConfig(spike_deviations=deviations, spike_window_steps=window)
    watch = LossWatch(config)
    for number, loss in enumerate(losses):
        before = watch.recent
        outcome = watch.judge(number, loss, 1.0)
        if len(before) < window:
            assert outcome == "good"
            continue
        mean = math.fsum(before) / window
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in before) / (window - 1))
        if abs(loss - mean - deviations * deviation) > 1e-9 * loss:
            assert (outcome == "spike") == (loss > mean + deviations * deviation)
        assert watch.recent == (before if outcome == "spike" else (*before[1:], loss))


def test_after_a_rewind_spikes_are_detected_from_the_saved_losses():
    watch = LossWatch(FaultsConfig(spike_window_steps=2), (9.0, 8.0))
    watch.rewound(7, 99.0, replace(STATE, recent_losses=(3.0, 2.5)))
    assert watch.recent == (3.0, 2.5)
    watch.rewound(7, 99.0, None)
    assert watch.recent == ()


def test_only_non_finite_steps_in_a_row_count():
    watch = LossWatch(FaultsConfig(max_nonfinite_steps=2))
    for step, norm in enumerate([math.nan, math.inf, -math.inf] * 3):
        assert watch.judge(2 * step, norm, norm) == "non-finite"
        assert watch.judge(2 * step + 1, 2.0, 1.0) == "good"


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_with_a_gradient_that_is_ends_the_run(loss):
    with pytest.raises(ArithmeticError, match=f"step 4: loss {loss} with gradient norm 1.0"):
        LossWatch(FaultsConfig()).judge(4, loss, 1.0)
