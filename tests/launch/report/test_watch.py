"""`longring watch`: the state of a run while it goes on."""

from __future__ import annotations

import io
import json
import os
import time

import pytest
from helpers.small_run import append, make_run, step_record
from longring.data.lock import held, holder
from longring.launch import cli
from longring.launch.commands import watch as watch_module
from longring.launch.report import state as state_module
from longring.launch.report.state import Observer
from longring.launch.report.tail import Tail
from longring.launch.run_directory import RunDirectory
from rich.console import Console


@pytest.fixture
def run(recipe_file, tmp_path) -> RunDirectory:
    return make_run(recipe_file, tmp_path / "run", 12)


def state_of(run: RunDirectory, capsys) -> dict:
    capsys.readouterr()
    assert cli.main(["watch", str(run.path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_state_of_a_run(run, capsys):
    found = state_of(run, capsys)
    assert (found["state"], found["step"], found["steps"], found["saved_step"]) == ("stopped", 12, 20, 6)
    assert found["tokens_per_s"] == 20480
    assert found["seconds_left"] == pytest.approx(0.8)
    with held(run.lock_file):
        assert "process" in (holder(run.lock_file) or "")
        assert state_of(run, capsys)["state"] == "running"
        report = {"number": 5, "step": 13, "operation": "summing over the ranks"}
        (run.logs / "rank-00001.hang.json").write_text(json.dumps(report))
        hangs = state_of(run, capsys)["hangs"]
        assert hangs == ["rank 1 without progress at step 13, summing over the ranks"]
    assert holder(run.lock_file) is None
    append(run.metrics_file, *map(step_record, range(13, 21)))
    assert state_of(run, capsys)["state"] == "finished"


def test_what_the_files_tell_about_the_ranks(run):
    assert Observer(run).state().pulse == "no rank runs"
    with held(run.lock_file):
        assert Observer(run).state().pulse.startswith("all ranks took part in the last step, ")
        hour_ago = time.time() - 3600
        os.utime(run.metrics_file, (hour_ago, hour_ago))
        assert Observer(run).state().pulse.startswith("no step for 1:00:0")
        append(run.starts_file, {"from_step": 12})
        assert Observer(run).state().pulse == "before the first step"


def test_a_run_that_ends_while_it_is_looked_at_has_not_stopped(run, monkeypatch):
    running, read = held(run.lock_file), Tail.read

    def read_and_end(tail: Tail):
        replaced, records = read(tail)
        found = list(records)
        if replaced:
            append(run.metrics_file, *map(step_record, range(13, 21)))
            running.__exit__(None, None, None)
        return replaced, found

    running.__enter__()
    monkeypatch.setattr(Tail, "read", read_and_end)
    observer = Observer(run)
    assert (observer.state().going, observer.state().going) == ("running", "finished")


def test_where_there_are_no_locks_a_run_goes_on_while_its_metrics_are_fresh(run, monkeypatch):
    def no_locks(file):
        raise OSError(f"{file}: No locks available")

    monkeypatch.setattr(state_module, "holder", no_locks)
    found = Observer(run).state()
    assert (found.going, found.holder) == ("running", "a process (no locks on this file system)")
    hour_ago = time.time() - 3600
    os.utime(run.metrics_file, (hour_ago, hour_ago))
    assert Observer(run).state().going == "stopped"


def test_lines_in_a_pipe(run, capsys, monkeypatch):
    """A line for every change and event, whole and without colour, until the run ends."""
    running, looks = held(run.lock_file), []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 1:
            append(run.metrics_file, step_record(13))
        elif len(looks) == 2:
            append(run.events_file, {"time": "t", "event": "spike", "step": 13, "message": "loss [9]"})
        else:
            running.__exit__(None, None, None)

    monkeypatch.setattr(watch_module.time, "sleep", sleep)
    running.__enter__()
    assert cli.main(["watch", str(run.path), "--every", "3"]) == 0
    out = capsys.readouterr().out
    assert looks == [3, 3, 3]
    assert "\x1b" not in out
    changes = out.splitlines()[-3:]
    assert changes[0].startswith("step 13/20  loss ")
    assert changes[1] == "t step 13, spike: loss [9]"
    assert changes[2].endswith("stopped")


def test_a_screen_is_whole_at_80_columns(run):
    for step in range(13, 20):
        append(run.metrics_file, step_record(step, tokens=10**13, tokens_per_s=1e7, bucket=2**20, cp=128, step_ms=1e5))
    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=True)
    with held(run.lock_file):
        assert watch_module.watch(run, console, every_s=1, once=True, as_json=False) == 0
    text = stream.getvalue()
    assert "…" not in text
    assert "1,048,576" in text
    assert "10,000,000" in text


def test_no_run(tmp_path, capsys):
    for command in ("watch", "report"):
        assert cli.main([command, str(tmp_path)]) == 2
        assert "not a run directory, since it has no recipe.json" in capsys.readouterr().err
