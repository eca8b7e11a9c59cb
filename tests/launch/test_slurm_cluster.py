"""A job on a Slurm cluster of two nodes on this machine: it is stopped, requeued, preempted, loses a node, and ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.faulty import start
from longring.launch import cli
from longring.launch.evaluate import evaluate_weights
from longring.launch.records import read_records
from rich.console import Console

CLUSTER = Path(__file__).with_name("slurm_cluster.sh")
MISSING = [name for name in ("slurmctld", "slurmd", "munged") if not shutil.which(name, path="/usr/sbin:/usr/bin")]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING) or os.geteuid() != 0,
        reason=f"a cluster needs root and Debian's packages slurm-wlm and munge (missing here: {MISSING or 'root'}): "
        "as root, apt-get install slurm-wlm munge",
    ),
]
EXACT = ("step", "tokens", "loss", "bucket", "cp", "learning_rate", "grad_norm")


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Iterator[Callable[..., None]]:
    """A running cluster, as a function: `cluster("fail", "n2")` and `cluster("mend", "n2")`."""
    directory = tmp_path / "slurm"

    def call(verb: str, *arguments: str) -> None:
        subprocess.run([CLUSTER, verb, directory, *arguments], check=True)

    monkeypatch.setenv("SLURM_CONF", str(directory / "slurm.conf"))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.setenv("LONGRING_PYTHON", sys.executable)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LONGRING_STEP_WAIT_S", "30")
    try:
        call("up")
        yield call
    finally:
        subprocess.run(["scancel", "--full", "--user=root"], check=False)
        call("down")


def shell(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def steps_of(run: Path) -> list[int]:
    file = run / "metrics.jsonl"
    return [step["step"] for step in read_records(file)] if file.exists() else []


def until(event: str, reached: Callable[[], bool], output: Path, timeout_s: float = 150) -> None:
    """Wait for it. A job held back for its begin time is let go after 5 s: at once, its nodes might still refuse it."""
    deadline, held = time.monotonic() + timeout_s, dict[str, float]()
    while not reached():
        said = output.read_text() if output.exists() else "nothing"
        assert time.monotonic() < deadline, (
            f"not within {timeout_s:.0f} s: {event}\n{said[-3000:]}\n{shell('squeue', '-l')}"
        )
        for job in shell("squeue", "-h", "-t", "PD", "-o", "%i").split():
            if time.monotonic() < held.setdefault(job, time.monotonic()) + 5:
                continue
            subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now"], check=False, capture_output=True)
        time.sleep(0.5)


def test_a_job_is_told_to_leave_is_preempted_loses_a_node_and_ends_like_one_that_was_left_alone(
    cluster, recipe_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    common = ["train.steps=150", "train.checkpoint_every_steps=10", "parallel.tokens_per_rank=256"]
    common += ["parallel.cp.topology=full_mesh"]  # two runs that probe might take different grids
    resources = [
        *("slurm.cpu=true", "slurm.ranks_per_node=1", "slurm.time=0:20:00", "slurm.job_name=longring"),
        *("slurm.options.exclusive=''", "slurm.options.mem=''", "slurm.options.ntasks-per-node='1'"),
    ]
    run = tmp_path / "run"
    command = ["submit", str(recipe_file), *common, *resources, f"run_directory={run}", "--nodes", "2"]
    assert cli.main(command) == 0
    job = capsys.readouterr().out.split()[-1]
    output = tmp_path / f"longring-{job}.out"

    until("20 steps", lambda: len(steps_of(run)) >= 20, output)
    shell("scancel", "--signal=USR1", job)
    until("the signal heard", lambda: "saved; the same command continues the run" in output.read_text(), output)
    until("the requeue", lambda: "ended with status 75: requeued" in output.read_text(), output)
    stopped = steps_of(run)[-1]
    until("20 more steps", lambda: steps_of(run)[-1] >= stopped + 20, output)
    shell("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    until(
        "preemption heard", lambda: output.read_text().count("saved; the same command continues the run") == 2, output
    )
    preempted = steps_of(run)[-1]
    until("20 more steps", lambda: steps_of(run)[-1] >= preempted + 20, output)
    cluster("fail", "n2")
    failed = steps_of(run)[-1]
    assert failed < 150, "the node failed during the job"
    until("the node's loss noticed", lambda: bool(shell("squeue", "-h", "-t", "PD").strip()), output)
    cluster("mend", "n2")
    until("the end", lambda: steps_of(run)[-1:] == [150] and not shell("squeue", "-h").strip(), output, 240)

    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert [start["slurm_job"] for start in starts] == [job] * 4
    assert [start["world_size"] for start in starts] == [2] * 4
    assert [start["from_step"] for start in starts[:3]] == [0, stopped, preempted], (
        "each start continues from the step that the signal saved"
    )
    assert 0 <= failed - starts[3]["from_step"] <= 12, "at most the steps since the last checkpoint are lost"
    assert re.search(r"STEP \S+ ON n1 CANCELLED", output.read_text()), "Slurm reports the preemption"
    whole = tmp_path / "whole"
    said = tmp_path / "whole.txt"
    assert start(2, recipe_file, [*common, f"run_directory={whole}"], said).wait() == [0, 0], said.read_text()
    ours, theirs = ([[step[key] for key in EXACT] for step in read_records(r / "metrics.jsonl")] for r in (run, whole))
    assert ours == theirs


def test_a_job_with_a_wrong_recipe_ends_with_the_error_and_is_not_requeued(cluster, recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGRING_RANKS_PER_NODE", "1")
    script = Path(cli.__file__).parents[1] / "slurm" / "train.sbatch"
    options = ["--gpus-per-node=0", "--mem=100", "--nodes=2", "--ntasks-per-node=1", "--parsable"]
    job = shell("sbatch", *options, str(script), str(recipe_file), "slurm.cpu=true", "train.stepz=1").strip()
    output = tmp_path / f"longring-train-{job}.out"
    until("the end", lambda: output.exists() and "nothing is requeued" in output.read_text(), output)
    said = " ".join(output.read_text().split())
    assert "did you mean train.steps?" in said
    until("the job gone", lambda: not shell("squeue", "-h").strip(), output)
    assert "start 2" not in said


def evaluated(target: str, recipe_file: Path, overrides: list[str], logs: Path) -> dict[str, Any] | None:
    return evaluate_weights(Path(target), str(recipe_file), overrides, logs, Console(quiet=True))


APPTAINER = """#!/bin/bash
[[ $1 == exec ]] && shift
while [[ $1 == --* ]]; do [[ $1 == --nv ]] || shift; shift; done
echo "in $1" && shift && exec "$@"
"""


def test_a_job_on_two_nodes_evaluates_what_one_rank_evaluates(
    cluster, on_ranks, recipe_file, tmp_path, monkeypatch, capsys
):
    """The job runs in a container, for which a false apptainer stands that runs its words on the machine."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    for name, text in (("apptainer", APPTAINER), ("python3", f'#!/bin/bash\nexec "{sys.executable}" "$@"\n')):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("LONGRING_PYTHON", "/not/in/the/image")
    (tmp_path / "longring.sif").touch()
    run, said = tmp_path / "run", tmp_path / "trained.txt"
    steps = ["train.steps=6", "train.checkpoint_every_steps=3", "parallel.tokens_per_rank=256"]
    assert start(2, recipe_file, [*steps, f"run_directory={run}"], said).wait() == [0, 0], said.read_text()
    resources = [
        *("slurm.cpu=true", "slurm.ranks_per_node=1", "slurm.time=0:20:00"),
        *("slurm.options.exclusive=''", "slurm.options.mem=''", "slurm.options.ntasks-per-node='1'"),
    ]
    measured = ["evaluate.samples=2", "evaluate.max_tokens_per_bucket=1024", 'evaluate.tasks=["copy_text"]']
    targets, file = [str(run / "checkpoints" / "step-00000003"), str(run)], tmp_path / "found.json"
    words = ["submit", str(recipe_file), f"run_directory={run}", *resources, *measured, "--nodes", "2"]
    words += [word for target in targets for word in ("--weights", target)]
    words += ["--container", "longring.sif", "parallel.tokens_per_rank=256"]
    assert cli.main([*words, "--json", str(file)]) == 0
    output = tmp_path / f"run-evaluate-{capsys.readouterr().out.split()[-1]}.out"
    until("the results", file.exists, output)
    until("the job gone", lambda: not shell("squeue", "-h").strip(), output)
    assert output.read_text().count(f"in {tmp_path}/longring.sif\n") == 2, "on both nodes"
    found = json.loads(file.read_text())["targets"]
    assert [result["step"] for result in found] == [3, 6]
    for target, result in zip(targets, found, strict=True):
        [expected] = on_ranks(1, evaluated, target, recipe_file, measured, tmp_path / "logs")
        assert [entry["cp"] for entry in result["buckets"]] == [1, 1, 1, 2]
        assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert [entry["exact"] for entry in result["tasks"]] == [entry["exact"] for entry in expected["tasks"]]
