"""Processes: no orphan outlives its launcher, a stopped rank goes on, and all ranks end for a port or a dead rank."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from helpers.faulty import DEADLINE_S, Fault, Run, start, start_command
from helpers.lanes import by_lane
from helpers.ranks import variables_of
from longring.launch import train as train_module
from longring.launch.errors import GO_ON_LATER

pytestmark = pytest.mark.full

LAUNCHERS = {
    "longring": ["longring.launch.cli", "train", "--ranks", "2"],
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "longring.launch.train"],
}


def until(reached: Callable[[], object], run: Run) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not reached():
        assert time.monotonic() < deadline, run.output.read_text()
        time.sleep(0.01)


def launched(run: Run, launcher: str) -> psutil.Popen:
    """Start the run by a launcher in a process of its own."""
    words = [sys.executable, "-m", *LAUNCHERS[launcher], str(run.recipe_file), *run.overrides]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    with run.output.open("a") as output:
        return psutil.Popen(words, env=environment, stdout=output, stderr=subprocess.STDOUT)


def kill_once(reached: Callable[[psutil.Popen], object], launcher: psutil.Popen, run: Run) -> None:
    """Kill the launcher once a condition holds, and wait until all its processes have ended."""
    until(lambda: launcher.poll() is not None or reached(launcher), run)
    family = launcher.children(recursive=True)
    launcher.kill()
    assert launcher.wait() == -signal.SIGKILL, run.output.read_text()
    _, alive = psutil.wait_procs(family, DEADLINE_S)
    for process in alive:
        process.kill()
    assert not alive


@pytest.mark.slow
def test_ranks_end_with_their_launcher_and_save_before(run, whole):
    """Three starts lose their launcher: one in its first steps under each launcher, one before the ranks have met."""
    metrics = run.path / "metrics.jsonl"
    for number, name in enumerate(LAUNCHERS, start=1):
        done = num_lines(metrics)
        kill_once(lambda _, done=done: num_lines(metrics) > done, launched(run, name), run)
        assert [event["event"] for event in run.events] == ["stopped"] * number, "the ranks have saved and stopped"
    kill_once(lambda launcher: len(launcher.children()) == 2, launched(run, "longring"), run)
    assert num_lines(run.path / "starts.jsonl") == 2, "the ranks of the third start have ended before they began"
    run.finish(whole)


def num_lines(file: Path) -> int:
    return file.read_text().count("\n") if file.exists() else 0


def test_a_rank_that_was_stopped_and_goes_on_is_not_ended(run, whole):
    """Each rank in turn is stopped until the other has reported a hang, and then goes on, as do both ranks."""
    settings = ["faults.hang_minutes=0.1"]
    for rank, step, last in ((1, 3, 7), (0, 9, 12)):
        other = run.path / "logs" / f"rank-{1 - rank:05d}.hang.json"
        pauses = [Fault(1, "pause", step=at, operation="reading") for at in range(step + 1, last + 1)]
        stop = Fault(rank, "SIGSTOP", step=step, operation="summing")
        started = start(2, run.recipe_file, [*run.overrides, *settings], run.output, [stop, *pauses], stop_after=last)
        try:
            until(other.exists, run)
            os.kill(started.processes[rank].pid or 0, signal.SIGCONT)
            assert started.wait() == [0, 0], run.said
        finally:
            started.end()
        assert not other.exists(), "the report is withdrawn"
    assert not (run.path / "events.jsonl").exists()
    run.finish(whole)


def test_a_taken_port_ends_all_ranks_with_one_line(run, whole):
    """The port belongs to a process that never answers: torch would wait for it without a limit."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for _ in range(2):
            run.output.unlink(missing_ok=True)
            started = start(2, run.recipe_file, run.overrides, run.output, port=port)
            assert started.wait() == [GO_ON_LATER] * 2
            assert run.said.count("error:") == 1
            assert f"MASTER_PORT = {port}: the port is in use here; name the first machine and a port" in run.said
    run.finish(whole)


ABSURD = {"RANK": "abc", "WORLD_SIZE": "0", "LOCAL_RANK": "x", "LOCAL_WORLD_SIZE": "-2", "MASTER_PORT": "70000"}


@pytest.mark.parametrize("name", ABSURD)
def test_an_absurd_variable_ends_its_rank_with_one_line(name, recipe_file, capsys, monkeypatch):
    for variable, value in {**variables_of(0, 2), name: ABSURD[name]}.items():
        monkeypatch.setenv(variable, value)
    assert train_module.main([str(recipe_file)]) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and "Traceback" not in error
    assert f"{name} = '{ABSURD[name]}': must be a whole number" in " ".join(error.split())


@pytest.fixture
def run(recipe_file: Path, tmp_path: Path) -> Run:
    return Run(recipe_file, tmp_path)


def arguments_of(command: str, recipe_file: Path, run: Run) -> list[str]:
    """Return the arguments of each rank of a command, whose ranks count as hanging after three seconds."""
    if command == "evaluate":
        recipe = json.loads((run.path / "recipe.json").read_text())
        recipe["faults"]["hang_minutes"] = 0.05
        (run.path / "recipe.json").write_text(json.dumps(recipe))
        return [str(run.path)]
    settings = [str(recipe_file), "parallel.tokens_per_rank=256", "faults.hang_minutes=0.05"]
    if command == "commands.topology":
        return settings
    return [*settings, "--grid=query=2", "--tokens=512", "--topology=full_mesh", f"--timeline={run.path}.png"]


AT = {"evaluate": "evaluating sequence", "commands.plan": "measuring backward", "commands.topology": "measuring the"}
ENDS = [(command, action) for command in AT for action in ("hang", "SIGKILL")]
IN_FULL = [("evaluate", "hang"), ("commands.topology", "SIGKILL")]


@pytest.mark.parametrize(
    ("command", "action"), by_lane(ENDS, quick=[], slow=[case for case in ENDS if case not in IN_FULL])
)
def test_a_command_ends_where_one_of_its_ranks_hangs_or_is_gone(recipe_file, tmp_path, whole, command, action):
    run = whole.copy(tmp_path)
    fault = Fault(1, action, step=12 if command == "evaluate" else 0, operation=AT[command])
    started = start_command(command, [arguments_of(command, recipe_file, run)] * 2, run.output, [fault])
    started.processes[0].join(60)
    assert started.processes[0].exitcode == GO_ON_LATER, run.said
    started.end()
    assert "Traceback" not in run.said
    if action == "SIGKILL":
        assert run.said.count("error:") == 1
        assert re.search("lost its connection|cannot reach the other ranks", run.said)
    elif command == "evaluate":
        hangs = "rank 1 hangs at step 12, evaluating sequence 0 of 7 of bucket 64, and those after it"
        assert f"no progress for 3 s: {hangs}; the others wait: rank 0 at step 12, summing bucket 64 over" in run.said
    else:
        assert f"error: rank 0: no progress for 3 s at {AT[command]}" in run.said
