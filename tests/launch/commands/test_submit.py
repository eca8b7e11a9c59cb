"""Slurm jobs without Slurm: the script, the requeues, the checks of a node; and the signals of the launcher."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.small_checkpoint import make_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from longring.launch import cli
from longring.launch.checkpoint.format import checkpoint_name
from longring.launch.commands.submit import SCRIPT, job_script, requeue
from longring.launch.config import SlurmConfig, load_recipe
from longring.launch.metrics import read_metrics
from longring.launch.ranks import node
from longring.launch.ranks.node import check_node, rdma_ports
from longring.launch.run_directory import RunDirectory


def sbatch_lines(script: str) -> dict[str, str]:
    found = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH --")]
    names = [line.partition("=")[0] for line in found]
    assert len(set(names)) == len(names), "each option once"
    return {line.partition("=")[0]: line.partition("=")[2] for line in found}


def test_the_job_has_the_recipes_resources(recipe_file):
    overrides = ["slurm.partition=gpu", "slurm.time=2-00:00:00", "slurm.options.nice='5'", "slurm.options.mem=''"]
    script = job_script(load_recipe(recipe_file, [*overrides, "slurm.ranks_per_node=4"]), 1)
    lines = sbatch_lines(script)
    assert lines == {
        "job-name": "run",
        "nodes": "1",
        "gpus-per-node": "4",
        "exclusive": "",
        "time": "2-00:00:00",
        "signal": "USR1@300",
        "output": "%x-%j.out",
        "open-mode": "append",
        "requeue": "",
        "partition": "gpu",
        "nice": "5",
    }
    body = [line for line in SCRIPT.read_text().splitlines() if not line.startswith("#SBATCH")]
    assert [line for line in script.splitlines() if not line.startswith("#SBATCH")] == body
    assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0
    cpu = job_script(load_recipe(recipe_file, ["slurm.cpu=true", "slurm.ranks_per_node=4"]), 1)
    assert "gpus-per-node" not in sbatch_lines(cpu)
    assert "\nexport LONGRING_RANKS_PER_NODE=4\n" in cpu


def test_a_job_that_cannot_run_is_not_submitted(recipe_file):
    recipe = load_recipe(recipe_file, ["parallel.tokens_per_rank=128", "slurm.ranks_per_node=3"])
    with pytest.raises(ValueError, match="world of 6 ranks: cannot hold"):
        job_script(recipe, 2)


@given(value=st.text(min_size=1, max_size=20))
def test_no_option_of_sbatch_leaves_its_line(value):
    """A value that could end a line or begin a command is refused."""
    if set(value) & set(" \t\n\r;'\"`$\\#<>"):
        with pytest.raises(ValueError, match=r"slurm\.partition"):
            SlurmConfig(partition=value)
    elif value.isascii() and value.isalnum():
        assert SlurmConfig(partition=value).partition == value


def test_sbatch_gets_the_script_and_the_recipe(recipe_file, tmp_path, monkeypatch, capsys):
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/words\ncat "$1" > {tmp_path}/script\necho Submitted 7\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    run = tmp_path / "run"
    settings = [f"run_directory={run}", "slurm.ranks_per_node=4"]
    assert cli.main(["submit", str(recipe_file), *settings, "--nodes", "1"]) == 0
    assert capsys.readouterr().out == "Submitted 7\n"
    assert (tmp_path / "words").read_text().split() == [str(run / "job.sbatch"), str(recipe_file), *settings]
    assert (tmp_path / "script").read_text() == job_script(load_recipe(recipe_file, settings), 1)
    RunDirectory(run).check(load_recipe(recipe_file, settings))  # the run may still start there
    sbatch.write_text("#!/bin/bash\necho 'Requested node configuration is not available' >&2; exit 1\n")
    assert cli.main(["submit", str(recipe_file), *settings, "--nodes", "1"]) == 2
    assert "sbatch: refused" in capsys.readouterr().err


def test_a_job_starts_again_while_it_makes_progress(recipe_file, tmp_path, monkeypatch):
    recipe = load_recipe(recipe_file, [f"run_directory={tmp_path}/run", "slurm.max_fruitless_starts=2"])
    checkpoints = RunDirectory(recipe.run_directory).checkpoints
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert [requeue(recipe).again for _ in range(3)] == [True, True, False], "a first requeue and one more"
    message = "slurm.max_fruitless_starts = 2: 4 starts have ended with step 0 as the last one saved"
    assert message in requeue(recipe).reason
    make_checkpoint(checkpoints, 10)
    assert [requeue(recipe).again for _ in range(2)] == [True, True]
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert requeue(recipe).again, "another job has its own count"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert not requeue(recipe).again
    make_checkpoint(checkpoints, 20)
    verdict = requeue(recipe)
    assert not verdict.again
    assert verdict.reason.endswith(": all 20 steps are done")


def test_all_faults_of_a_node_are_in_one_error(recipe_file, tmp_path, monkeypatch):
    fine = ["slurm.cpu=true", f"run_directory={tmp_path}/run"]
    check_node(load_recipe(recipe_file, fine), 2)
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    (tmp_path / "file").write_text("")
    wrong = [f"run_directory={tmp_path}/file", "slurm.min_free_memory_gb=1e6"]
    with pytest.raises(ValueError, match="node n7: not fit to train") as error:
        check_node(load_recipe(recipe_file, wrong), 2)
    for part in (r"0 GPUs for 2 ranks", "2000000.0 needed (slurm.min_free_memory_gb", "file cannot be written"):
        assert part in str(error.value) or (part.startswith("0 GPUs") and "GPU" in str(error.value))
    with pytest.raises(ValueError, match=r"needed \(slurm.min_free_disk_gb, or two checkpoints\)"):
        check_node(load_recipe(recipe_file, [*fine, "slurm.min_free_disk_gb=1e9"]), 2)


def test_ports_that_are_down_are_counted(tmp_path, recipe_file, monkeypatch):
    for number, state in enumerate(("4: ACTIVE", "1: DOWN", "4: ACTIVE")):
        port = tmp_path / f"mlx5_{number}" / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
    assert rdma_ports(tmp_path) == (2, 3)
    assert rdma_ports(tmp_path / "none") == (0, 0)
    monkeypatch.setattr(node, "rdma_ports", lambda: (2, 3))
    settings = ["slurm.cpu=true", "slurm.min_free_disk_gb=0", "slurm.min_free_memory_gb=0"]
    settings += [f"run_directory={tmp_path}/run"]
    check_node(load_recipe(recipe_file, settings), 1)
    with pytest.raises(ValueError, match="2 of 3 InfiniBand or RoCE ports active, 3 needed"):
        check_node(load_recipe(recipe_file, [*settings, "slurm.min_rdma_ports=3"]), 1)


def launcher(recipe_file: Path, run: Path, output: Path) -> subprocess.Popen[str]:
    settings = ["train.steps=400", "train.checkpoint_every_steps=20", "parallel.tokens_per_rank=256"]
    words = [sys.executable, "-m", "longring.launch.cli", "train", str(recipe_file), *settings, "--ranks", "2"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    with output.open("w") as file:
        return subprocess.Popen([*words, f"run_directory={run}"], stdout=file, stderr=file, env=environment, text=True)


def rank_processes(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.full
@pytest.mark.parametrize(
    ("signal_name", "to_a_rank", "status", "said"),
    [
        ("SIGTERM", False, 75, "saved; the same command continues the run"),
        ("SIGKILL", True, 137, "ended by SIGKILL (out of memory, or sent by hand); the same command continues"),
    ],
)
def test_the_launcher_forwards_signals_and_reports_killed_ranks(
    recipe_file, tmp_path, signal_name, to_a_rank, status, said
):
    run, output = tmp_path / "run", tmp_path / "output.txt"
    process = launcher(recipe_file, run, output)
    try:
        deadline = time.monotonic() + 120
        metrics = run / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 30:
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.1)
        os.kill(rank_processes(process)[1] if to_a_rank else process.pid, getattr(signal, signal_name))
        assert process.wait(60) == status
    finally:
        process.kill()
    assert said in " ".join(output.read_text().split())
    assert "Traceback" not in output.read_text()
    last = max((run / "checkpoints").iterdir()).name
    done = read_metrics(metrics)[-1]["step"]
    assert last == (checkpoint_name(20) if to_a_rank and done < 40 else last)
    assert to_a_rank or last == checkpoint_name(done)
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert starts[0]["world_size"] == 2
    shutil.rmtree(run)
