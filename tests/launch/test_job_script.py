"""The job scripts name a variable that is missing or absurd before they calculate with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from longring.launch import cli

SCRIPTS = Path(cli.__file__).parents[1] / "slurm"
SRUN = '#!/bin/bash\necho "srun $*"\nexit 2\n'
PYTHON = '#!/bin/bash\necho "python $*"\n'
JOB = {
    "SLURM_JOB_ID": "71",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_CPUS_ON_NODE": "16",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_SUBMIT_DIR": ".",
    "LONGRING_PYTHON": sys.executable,
}
GONE = "<not set>"


def run(
    directory: Path, variables: dict[str, str], script: str = "train.sbatch", srun: str = SRUN
) -> tuple[int, str, str]:
    """Run a script in a job with a false srun and a false Python; return its status and output."""
    for name, content in (("srun", srun), ("scontrol", "#!/bin/bash\necho localhost\n"), ("python", PYTHON)):
        (directory / name).write_text(content)
        (directory / name).chmod(0o755)
    (directory / "recipe.toml").touch()
    environment = {"PATH": f"{directory}:{os.environ['PATH']}", **JOB, **variables}
    environment = {name: value for name, value in environment.items() if value != GONE}
    done = subprocess.run(
        ["bash", str(SCRIPTS / script), "recipe.toml"], cwd=directory, env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


TWO_NODES = """#!/bin/bash
# srun: runs the task of each node, and reports the highest status
while [[ $1 == --* ]]; do shift; done
worst=0
for SLURM_NODEID in 0 1; do
  export SLURM_NODEID SLURMD_NODENAME=localhost
  "$@" && status=0 || status=$?
  [[ $status -lt $worst ]] || worst=$status
done
exit "$worst"
"""
LAUNCHER = """#!/bin/bash
case $3 in
requeue) echo "asked to requeue"; exit 1 ;;
*) statuses=(STATUSES); exit "${statuses[SLURM_NODEID]}" ;;
esac
"""


@pytest.mark.parametrize("others", [75, 134, 137])
def test_an_error_to_correct_is_not_hidden_by_the_status_of_another_node(others, tmp_path):
    """The node with the error ends with the status that `longring train --job` has for it."""
    wrong = cli.main(["train", str(tmp_path / "none.toml"), "--job", "71-0"])
    assert cli.main(["train", str(tmp_path / "none.toml")]) == 2
    launcher = tmp_path / "launcher"
    local = {"LONGRING_PYTHON": str(launcher), "LONGRING_LOCAL_DIR": str(tmp_path)}
    for statuses, expected in ((f"{others} {wrong}", 2), (f"{wrong} {others}", 2), (f"75 {others}", others)):
        launcher.write_text(LAUNCHER.replace("STATUSES", statuses))
        launcher.chmod(0o755)
        status, said, error = run(tmp_path, local, srun=TWO_NODES)
        assert status == expected
        assert ("nothing is requeued" in error) == (expected == 2)
        assert ("asked to requeue" in said) == (expected != 2)


def test_a_node_without_python_ends_the_job(tmp_path):
    """The first node has a launcher that loses the other; it is gone when the second node looks for it."""
    launcher = tmp_path / "launcher"
    launcher.write_text('#!/bin/bash\nrm "$0"; exit 75\n')
    launcher.chmod(0o755)
    local = {"LONGRING_PYTHON": str(launcher), "LONGRING_LOCAL_DIR": str(tmp_path)}
    status, _, error = run(tmp_path, local, srun=TWO_NODES)
    assert status == 2
    assert f"no python at {launcher} on node localhost" in error and "nothing is requeued" in error


def test_a_job_starts_its_nodes(tmp_path):
    status, said, _ = run(tmp_path, {})
    assert status == 2, "the status of the false srun"
    assert "2 nodes (n[1-2]) x 8 ranks, rendezvous at localhost:20071" in said
    assert "srun --export=ALL " in said and " --nodes=2 --ntasks=2 " in said


WRONG = [
    *((name, value) for name in list(JOB)[:2] for value in (GONE, "", "abc", "-1", "08", "1+1", "a[$(touch x)]")),
    *(("SLURM_CPUS_ON_NODE", value) for value in (GONE, "many")),
    *(("SLURM_RESTART_COUNT", value) for value in ("", "x")),
    *((name, value) for name in ("SLURM_GPUS_ON_NODE", "LONGRING_RANKS_PER_NODE") for value in ("abc", "0", "x[0]")),
    ("SLURM_GPUS_ON_NODE", GONE),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_an_absurd_variable_is_one_line(name, value, tmp_path):
    status, said, error = run(tmp_path, {name: value})
    assert status == 2
    assert len(error.splitlines()) == 1 and error.startswith("error: ")
    assert ";" in error or ":" in error
    assert "srun" not in said and not (tmp_path / "x").exists()


def test_the_advice_about_the_number_of_ranks(tmp_path):
    _, _, error = run(tmp_path, {"SLURM_GPUS_ON_NODE": "0"})
    assert "0 GPUs in this allocation: ask for --gpus-per-node=N, or set LONGRING_RANKS_PER_NODE" in error
    assert "x 8 ranks" in run(tmp_path, {"SLURM_GPUS_ON_NODE": "8"})[1]
    assert "x 4 ranks" in run(tmp_path, {"SLURM_GPUS_ON_NODE": "0", "LONGRING_RANKS_PER_NODE": "4"})[1]


ARRAY = {
    f"SLURM_ARRAY_TASK_{name}": value for name, value in {"ID": "8", "MIN": "4", "STEP": "2", "COUNT": "3"}.items()
}


def test_a_task_of_an_array_prepares_its_part(tmp_path):
    python = {"LONGRING_PYTHON": str(tmp_path / "python")}
    command = "python -m longring.launch.cli prepare --workers 16"
    assert run(tmp_path, {**python, **ARRAY}, "prepare.sbatch")[:2] == (0, f"{command} --part 2/3 recipe.toml\n")
    unstepped = {**python, **ARRAY, "SLURM_ARRAY_TASK_STEP": GONE}
    assert run(tmp_path, unstepped, "prepare.sbatch")[1] == f"{command} --part 4/3 recipe.toml\n"
    assert run(tmp_path, python, "prepare.sbatch")[:2] == (0, f"{command} recipe.toml\n")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ARRAY for value in ("abc", "-1", "08", "1+1", "a[$(touch x)]")),
        *((name, value) for name in ("SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT") for value in (GONE, "")),
        *(("SLURM_CPUS_ON_NODE", value) for value in (GONE, "", "many", "a[$(touch x)]")),
        ("SLURM_ARRAY_TASK_ID", ""),
        ("SLURM_ARRAY_TASK_STEP", "0"),
    ],
)
def test_an_absurd_variable_of_an_array_is_one_line(name, value, tmp_path):
    variables = {"LONGRING_PYTHON": str(tmp_path / "python"), **ARRAY, name: value}
    status, said, error = run(tmp_path, variables, "prepare.sbatch")
    assert (status, said) == (2, "")
    assert len(error.splitlines()) == 1 and error.startswith(f"error: {name} = ") and "; submit with sbatch" in error
    assert not (tmp_path / "x").exists()
