"""Slurm jobs without Slurm: the script, the requeues, the checks of a node; and the signals of the launcher."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.faulty import Run
from helpers.small_checkpoint import make_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from longring.data import files
from longring.launch import cli
from longring.launch.checkpoint.format import checkpoint_name
from longring.launch.commands.submit import SCRIPT, job_script, requeue
from longring.launch.config import SlurmConfig, load_recipe
from longring.launch.ranks import node
from longring.launch.ranks.node import check_node, rdma_ports
from longring.launch.records import read_records
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


def test_a_job_evaluates_on_ranks_that_could_not_train(recipe_file):
    """Six ranks do not divide a batch of 2,048 tokens."""
    recipe = load_recipe(recipe_file, ["slurm.ranks_per_node=3"])
    with pytest.raises(ValueError, match="train.global_batch_tokens = 2048: must be a multiple of the 3072 tokens"):
        job_script(recipe, 2)
    assert sbatch_lines(job_script(recipe, 2, evaluates=True))["nodes"] == "2"


@given(value=st.text(min_size=1, max_size=20))
def test_no_option_of_sbatch_leaves_its_line(value):
    """A value that could end a line or begin a command is refused."""
    if set(value) & set(" \t\n\r;'\"`$\\#<>"):
        with pytest.raises(ValueError, match=r"slurm\.partition"):
            SlurmConfig(partition=value)
    elif value.isascii() and value.isalnum():
        assert SlurmConfig(partition=value).partition == value


HOSTILE = (
    *("a b", "a;touch PWNED", "$(touch PWNED)", "`touch PWNED`", "a'b", 'a"b', "a#b", "-x", "--wrap=x", "a\\", "%x%j"),
    *("é", "a&touch PWNED", "a|touch PWNED", "a*", "${IFS}", "!!", "~"),
)


def fake_sbatch(directory: Path) -> Path:
    """Make an sbatch that runs the script as a node does, in `directory`/bin; the launcher prints its words."""
    binaries = directory / "bin"
    binaries.mkdir()
    scripts = {
        "sbatch": 'set -e; script=$1; [[ $1 != -* ]]; shift; cp "$script" "$LOG/script"; bash -n "$script"\n'
        'grep "^#SBATCH" "$script" > "$LOG/lines"; bash "$script" "$@" > "$LOG/said" 2>&1; echo Submitted 7\n',
        "srun": 'while [[ $1 == --* ]]; do shift; done; "$@"\n',
        "scontrol": "echo localhost\n",
        "python": 'printf "%s\\n" "$@" > "$LOG/words"\n',
    }
    for name, text in scripts.items():
        (binaries / name).write_text(f"#!/bin/bash\n{text}")
        (binaries / name).chmod(0o755)
    return binaries


@pytest.mark.parametrize("name", HOSTILE)
def test_a_job_of_a_hostile_directory_runs_only_the_launcher(recipe_file, tmp_path, monkeypatch, capsys, name):
    """The run directory, the recipe and an override have the name; the script is rendered and run as on a node."""
    binaries, log = fake_sbatch(tmp_path), tmp_path / "log"
    log.mkdir()
    variables = {
        **{"PATH": f"{binaries}:{os.environ['PATH']}", "LOG": str(log), "LONGRING_PYTHON": str(binaries / "python")},
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURMD_NODENAME": "localhost"},
        **{"SLURM_CPUS_ON_NODE": "2", "SLURM_JOB_NODELIST": "localhost", "SLURM_SUBMIT_DIR": str(tmp_path)},
        **{"SLURM_GPUS_ON_NODE": "4", "LONGRING_LOCAL_DIR": str(tmp_path)},
    }
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    recipe = f"./{name}.toml"
    Path(recipe).write_text(recipe_file.read_text())
    words = [recipe, f"run_directory={name}", f"data.source.path={name}", "slurm.ranks_per_node=4"]
    for _ in range(2):  # a second submission meets the run directory of the first
        assert cli.main(["submit", *words, "--nodes", "1"]) == 0, capsys.readouterr().err
        ran = (log / "words").read_text().split("\n")
        assert ran[:3] == ["-m", "longring.launch.cli", "train"]
        assert ran[3:7] == words
        lines = (log / "lines").read_text().splitlines()
        assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=[\w.,:@%+=/-]+)?", line, re.ASCII) for line in lines)
        assert {line.partition("=")[0] for line in lines} == {
            f"#SBATCH --{option}" for option in sbatch_lines((log / "script").read_text())
        }
        assert not list(tmp_path.rglob("PWNED"))


def test_a_job_evaluates_the_recipes_run_or_weights_on_its_data(recipe_file, tmp_path, monkeypatch, capsys):
    binaries, log = fake_sbatch(tmp_path), tmp_path / "log"
    log.mkdir()
    variables = {
        **{"PATH": f"{binaries}:{os.environ['PATH']}", "LOG": str(log), "LONGRING_PYTHON": str(binaries / "python")},
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURMD_NODENAME": "localhost"},
        **{"SLURM_CPUS_ON_NODE": "2", "SLURM_JOB_NODELIST": "localhost", "SLURM_SUBMIT_DIR": str(tmp_path)},
        "LONGRING_LOCAL_DIR": str(tmp_path),
    }
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    here, run = str(recipe_file), f"run_directory={tmp_path / 'run'}"
    RunDirectory(tmp_path / "run").create(load_recipe(recipe_file))
    words = ["submit", here, "--nodes", "1", run, "slurm.cpu=true", "slurm.ranks_per_node=4", "evaluate.samples=3"]
    for evaluated, advice in (
        (["--evaluate"], "only evaluate.* and parallel.* may differ from the run; leave it out"),
        (["--weights", "model/a"], "changes what the weights are; leave it out, or set one of"),
    ):
        assert cli.main([*words, *evaluated, "train.seed=1"]) == 2
        assert advice in capsys.readouterr().err
    for evaluated, expected in (
        ([], [here, run, "evaluate.samples=3"]),
        (["model/a", "model/b"], ["model/a", "model/b", "evaluate.samples=3", "--data", here]),
    ):
        options = [word for weights in evaluated for word in ("--weights", weights)] or ["--evaluate"]
        assert cli.main([*words, *options, "--tasks", "needle", "--json", "x.json"]) == 0, capsys.readouterr().err
        ran = (log / "words").read_text().split("\n")
        assert ran[2 : 3 + len(expected)] == ["evaluate", *expected]
        assert ran[3 + len(expected) :][:6] == ["--tasks", "needle", "--json", "x.json", "--ranks", "4"]
        assert "--check-node" not in ran
    assert sbatch_lines((log / "script").read_text())["job-name"] == "run-evaluate"
    assert (tmp_path / "run" / "evaluation.sbatch").is_file() and not (tmp_path / "run" / "job.sbatch").exists()
    monkeypatch.setenv("LONGRING_COMMAND", "rm")
    done = subprocess.run(["bash", str(SCRIPT), here], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: LONGRING_COMMAND = 'rm': must be train or evaluate\n")


def test_a_job_that_would_train_takes_no_option_of_an_evaluation(recipe_file, tmp_path, capsys):
    words = ["submit", str(recipe_file), "--nodes", "1", "--print", f"run_directory={tmp_path / 'run'}"]
    words.append("slurm.ranks_per_node=4")
    RunDirectory(tmp_path / "run").create(load_recipe(recipe_file))
    for options in (["--tasks", "needle", "--json", "x.json"], ["--picture", "x.png"]):
        given = ", ".join(options[::2])
        assert cli.main([*words, *options]) == 2
        assert (
            f"error: {given}: the job would train, which takes no such option; add --evaluate or --weights WEIGHTS, or "
            f"leave out {given}"
        ) in " ".join(capsys.readouterr().err.split())
        for advised in ([*options, "--evaluate"], [*options, "--weights", "model/a"], []):
            assert cli.main([*words, *advised]) == 0, capsys.readouterr().err


def test_a_job_with_an_unknown_task_is_not_submitted(recipe_file, capsys):
    words = ["submit", str(recipe_file), "--nodes", "1", "--print", "slurm.ranks_per_node=4"]
    weights, wrong = ["--weights", "model/a"], 'evaluate.tasks=["haystack"]'
    for options in ([*weights, "--tasks", "haystack"], [*weights, wrong], ["train.evaluate_every_steps=5", wrong]):
        assert cli.main([*words, *options]) == 2
        assert "evaluate.tasks = haystack: there is no such task; name" in capsys.readouterr().err
        known = [option.replace("haystack", "copy") for option in options]
        assert cli.main([*words, *known]) == 0, capsys.readouterr().err


@given(st.text(max_size=30))
def test_no_run_directory_adds_a_line_to_the_job(recipe_file, name):
    template = SCRIPT.read_text().splitlines()
    try:
        recipe = load_recipe(recipe_file, ["slurm.ranks_per_node=4", f"run_directory=x{name}"])
    except ValueError as error:
        assert "holds a " in str(error)  # noqa: PT017
        recipe = replace(load_recipe(recipe_file, ["slurm.ranks_per_node=4"]), run_directory=f"x{name}")
    assert len(job_script(recipe, 1).splitlines()) == len(template)


def test_the_script_is_checked_as_rendered(recipe_file):
    """Even a value that no recipe can hold does not leave its line."""
    recipe = load_recipe(recipe_file, ["slurm.ranks_per_node=4"])
    slurm = copy.copy(recipe.slurm)
    for value in ("gpu\n#SBATCH --wrap=x", "gpu --wrap=x", "gpu\ntouch PWNED", "$(id)", "gpu\r", "gpu\u2028x"):
        object.__setattr__(slurm, "partition", value)
        with pytest.raises(ValueError, match="job script: .*: not one option of sbatch; correct the recipe's table"):
            job_script(replace(recipe, slurm=slurm), 1)


@pytest.mark.parametrize(
    "name", ["wrap", "export", "container", "output", "error", "chdir", "nodes", "job-name", "a b"]
)
def test_an_option_that_could_run_or_write_something_is_refused(recipe_file, name):
    with pytest.raises(ValueError, match=r"slurm\.options\."):
        load_recipe(recipe_file, [f'slurm.options={{"{name}"="x"}}'])


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
    RunDirectory(run).check_is_run()  # the run may still start there
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


def test_a_job_whose_checkpoint_cannot_be_read_starts_again_a_few_times(recipe_file, tmp_path, monkeypatch):
    recipe = load_recipe(recipe_file, [f"run_directory={tmp_path}/run", "slurm.max_fruitless_starts=2"])
    monkeypatch.setattr(files.time, "sleep", lambda _: None)
    manifest = make_checkpoint(RunDirectory(recipe.run_directory).checkpoints, 20) / "manifest.json"
    manifest.unlink()
    manifest.symlink_to(manifest)  # ELOOP
    verdicts = [requeue(recipe) for _ in range(3)]
    assert [verdict.again for verdict in verdicts] == [True, True, False]
    assert verdicts[0].reason == "starting again from a checkpoint that cannot be read"


def test_all_faults_of_a_node_are_in_one_error(recipe_file, tmp_path, monkeypatch):
    fine = ["slurm.cpu=true", f"run_directory={tmp_path}/run"]
    check_node(load_recipe(recipe_file, fine), 2)
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    (tmp_path / "file").write_text("")
    wrong = [f"run_directory={tmp_path}/file", "slurm.min_free_memory_gb=1e6"]
    with pytest.raises(ValueError, match="node n7: not fit to train") as error:
        check_node(load_recipe(recipe_file, wrong), 2)
    for part in (
        r"0 GPUs for 2 ranks",
        "2000000.0 needed (slurm.min_free_memory_gb",
        "file/logs cannot be written: Not a directory",
    ):
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


def launcher(run: Run) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "longring.launch.cli", "train", str(run.recipe_file), *run.overrides, "--ranks", "2"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    with run.output.open("w") as file:
        return subprocess.Popen(words, stdout=file, stderr=file, env=environment, text=True)


def rank_processes(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.parametrize(
    ("signal_name", "to_a_rank", "status", "said"),
    [
        pytest.param(*("SIGTERM", False, 75, "saved; the same command continues the run"), marks=pytest.mark.full),
        pytest.param(
            *("SIGKILL", True, 137, "ended by SIGKILL (out of memory, or sent by hand); the same command continues"),
            marks=pytest.mark.slow,
        ),
        pytest.param(*("SIGINT", False, 130, "step 30"), marks=pytest.mark.slow),
    ],
)
def test_the_launcher_forwards_signals_and_reports_killed_ranks(
    recipe_file, tmp_path, signal_name, to_a_rank, status, said
):
    """The run of 100 steps is interrupted after about 30, and ends a second and a third time."""
    run = Run(recipe_file, tmp_path, ["train.steps=100", "train.checkpoint_every_steps=20"])
    process = launcher(run)
    try:
        deadline = time.monotonic() + 300
        metrics = run.path / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 30:
            assert process.poll() is None, run.output.read_text()
            assert time.monotonic() < deadline, run.output.read_text()
            time.sleep(0.1)
        os.kill(rank_processes(process)[1] if to_a_rank else process.pid, getattr(signal, signal_name))
        assert process.wait(60) == status
    finally:
        process.kill()
    assert said in run.said
    assert "Traceback" not in run.output.read_text()
    last = max((run.path / "checkpoints").iterdir()).name
    done = read_records(metrics)[-1]["step"]
    saved = signal_name == "SIGTERM"
    assert last == (checkpoint_name(20) if not saved and done < 40 else last)
    assert not saved or last == checkpoint_name(done)
    starts = [json.loads(line) for line in (run.path / "starts.jsonl").read_text().splitlines()]
    assert starts[0]["world_size"] == 2
    run.finish()
