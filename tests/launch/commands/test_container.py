"""Jobs in containers without a container: a false srun with pyxis, a false apptainer, and the real job script."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.lanes import by_lane
from longring.data.format.manifest import open_prepared
from longring.launch import cli
from longring.launch.commands.container import container_of, preparation_directories, run_directories
from longring.launch.commands.submit import SCRIPT
from longring.launch.config import load_recipe

PYXIS_HELP = "      --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH"
PROGRAMS = {
    # A node of a cluster with pyxis: options of srun and of the container are recorded, and the task runs.
    "srun": f'if [[ $1 == --help ]]; then [[ -e $LOG/no-pyxis ]] || echo "{PYXIS_HELP}"; exit; fi\n'
    'for word; do [[ $word != --* ]] || echo "$word" >> "$LOG/srun"; done\n'
    'while [[ $1 == --* ]]; do shift; done\n"$@"\n',
    "apptainer": '[[ $1 == exec ]]; shift; echo --- >> "$LOG/apptainer"\n'
    'while [[ $1 == --* ]]; do echo "$1" >> "$LOG/apptainer"\n'
    '  [[ $1 == --nv ]] || { echo "$2" >> "$LOG/apptainer"; shift; }; shift; done\n'
    'echo "$1" >> "$LOG/apptainer"; shift\n'
    "export NCCL_DEBUG=INFO LD_LIBRARY_PATH=/of/the/image\n"
    'while read -r line; do export "${line#APPTAINERENV_}"; done < <(env | grep ^APPTAINERENV_)\n'
    'exec "$@"\n',
    "scontrol": '[[ $1 != requeue ]] || echo "requeued $2" >> "$LOG/requeued"\necho localhost\n',
    # The python of the image: the launcher ends with a status, and the job asks it whether to start again.
    "python3": 'echo "$*" >> "$LOG/python3"; env > "$LOG/environment"\n'
    '[[ $3 == requeue ]] || exit "$(cat "$LOG/status")"\n',
    "sbatch": 'script=$1; shift; cp "$script" "$LOG/script"; bash "$script" "$@" > "$LOG/said" 2>&1\n'
    'echo $? > "$LOG/ended"; echo Submitted 7\n',
}


@pytest.fixture
def log(tmp_path, recipe_file, monkeypatch) -> Path:
    """A directory in which the programs of a false cluster record their words; recipe.toml lies in the working one."""
    binaries, log = tmp_path / "bin", tmp_path / "log"
    for name in ("bin", "log", "work", "run"):
        (tmp_path / name).mkdir()
    for name, text in PROGRAMS.items():
        (binaries / name).write_text(f"#!/bin/bash\n{text}")
        (binaries / name).chmod(0o755)
    variables = {
        **{"PATH": f"{binaries}:{os.environ['PATH']}", "LOG": str(log), "LONGRING_LOCAL_DIR": str(tmp_path / "local")},
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURMD_NODENAME": "localhost"},
        **{"SLURM_CPUS_ON_NODE": "2", "SLURM_JOB_NODELIST": "localhost", "SLURM_SUBMIT_DIR": str(tmp_path / "work")},
        **{"SLURM_GPUS_ON_NODE": "4", "NCCL_IB_HCA": "mlx5_0,mlx5_1", "LD_LIBRARY_PATH": "/of/the/node"},
    }
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("LONGRING_PYTHON", raising=False)
    monkeypatch.chdir(tmp_path / "work")
    Path("recipe.toml").write_text(recipe_file.read_text())
    (log / "status").write_text("0")
    return log


def submit(*words: str) -> int:
    job = ["submit", "recipe.toml", "run_directory=../run", "slurm.ranks_per_node=4", "--nodes", "1"]
    return cli.main([*job, *words])


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def mounted(log: Path, recipe_file: Path) -> list[str]:
    """Directories of machines that the ranks see: of submission, for compiled kernels, of data and of the run."""
    return [
        str(log.parent / "work"),
        str(log.parent / "local"),
        str(recipe_file.parent / "data"),
        str(log.parent / "run"),
    ]


REGISTRY, FILE = "nvcr.io#lab/longring:0.2", "longring.sif"
ENDS = [(image, status) for image in (REGISTRY, FILE) for status in (0, 75, 250)]


@pytest.mark.parametrize(("image", "status"), by_lane(ENDS, quick=[(REGISTRY, 75)]))
def test_a_job_runs_in_its_image(log, recipe_file, capsys, image, status):
    """The launcher and the decision to requeue run in the image, with the directories and the status of a bare job."""
    (log / "status").write_text(str(status))
    Path(FILE).touch()
    again = status == 75
    assert submit("--container", image) == 0, capsys.readouterr().err
    said = (log / "said").read_text()
    assert (log / "ended").read_text().strip() == ("0" if status in (0, 75) else "2"), said
    launcher, *asked = lines(log / "python3")
    assert launcher.startswith("-m longring.launch.cli train recipe.toml run_directory=../run slurm.ranks_per_node=4")
    assert [line[:29] for line in asked] == ["-m longring.launch.cli requeue"[:29]] * again
    assert lines(log / "requeued") == ["requeued 7"] * again
    directories = mounted(log, recipe_file)
    if image == FILE:
        used = ["---", "--nv", "--bind", ",".join(directories), "--pwd", directories[0], f"{directories[0]}/{image}"]
        assert lines(log / "apptainer") == used * (1 + again)
        assert "--container-image" not in (log / "srun").read_text()
        assert {"NCCL_DEBUG=WARN", "LD_LIBRARY_PATH=/of/the/image"} <= set(lines(log / "environment"))
    else:
        options = [word for word in lines(log / "srun") if word.startswith("--container")]
        assert options[:3] == [
            f"--container-image={image}",
            f"--container-mounts={','.join(f'{path}:{path}' for path in directories)}",
            f"--container-workdir={directories[0]}",
        ]
        passed = options[3].removeprefix("--container-env=").split(",")
        assert {"NCCL_IB_HCA", "NCCL_DEBUG", "OMP_NUM_THREADS", "TRITON_CACHE_DIR", "PYTHONSAFEPATH"} <= set(passed)
        assert not {"PATH", "LD_LIBRARY_PATH", "HOME"} & set(passed), "these are the image's"
        assert len(options) == 4 * (1 + again)
    assert "NCCL_IB_HCA=mlx5_0,mlx5_1" in lines(log / "environment")
    assert "error: see above; nothing is requeued" in said or status != 250


@pytest.mark.full
def test_a_node_without_apptainer_ends_the_job(log):
    Path(FILE).touch()
    (log.parent / "bin" / "apptainer").unlink()
    assert submit("--container", FILE) == 0
    said = (log / "said").read_text()
    assert "error: no apptainer on node localhost, which runs " in said and "load its module in the shell" in said
    assert (log / "ended").read_text() == "2\n" and not lines(log / "requeued")


@pytest.mark.full
def test_what_no_node_can_run_is_refused_before_the_job_is_queued(log, capsys):
    (log / "no-pyxis").touch()
    for words, advice in (
        (["--container", "lab/longring"], "build a file that ends in .sif, which apptainer runs"),
        (["--container", "none.sif"], "no such file; build the image first, see docs/image.md"),
        (["--container", "a'$(id)"], "use letters, digits and ./:@+#=- alone, and rename a file"),
        (["--container", "a b"], "use letters, digits and ./:@+#=- alone, and rename a file"),
        (["--container", "docker://me:abc/def@host/x"], "name the image without it, and log in to the registry"),
        (["--mount", "/data"], "names a directory for a container; name its image with --container"),
        (["--container", "x", "--mount", "/a b"], "use letters, digits and .@+=- alone in names of directories"),
        (["--container", "x", "--mount", "/"], "use letters, digits and .@+=- alone in names of directories"),
    ):
        assert submit(*words) == 2
        error = capsys.readouterr().err
        assert advice in " ".join(error.split()) and "me:abc" not in error
        assert not (log / "script").exists(), "nothing is queued"
    (log / "no-pyxis").unlink()
    assert submit("--container", "lab/longring") == 0
    Path("none.sif").touch()
    assert submit("--container", "none.sif", "--mount", "/data") == 0
    assert "/data," in (log / "script").read_text()


def test_a_preparation_sees_its_sources_and_the_directory_in_which_data_appears(recipe_file, tmp_path, monkeypatch):
    (tmp_path / "corpus").mkdir()
    monkeypatch.chdir(tmp_path)
    words = ["data.source.path=corpus/*.jsonl", "data.directory=runs/data", f"data.tokenizer.path={recipe_file}"]
    recipe = load_recipe(recipe_file, words)
    assert preparation_directories(recipe) == [str(tmp_path / "corpus"), str(recipe_file), str(tmp_path / "runs")]
    hub = ["data.source.kind=hub", "data.source.path=team/corpus", "data.directory=/far/data"]
    assert preparation_directories(load_recipe(recipe_file, hub)) == ["/far"]


@pytest.mark.full
@pytest.mark.parametrize("image", [REGISTRY, FILE])
def test_a_preparation_runs_in_its_image(log, recipe_file, capsys, image):
    """Every task runs in the image, and the data is that of a preparation without one."""
    programs = {
        "sbatch": 'export SLURM_ARRAY_TASK_ID=0 SLURM_ARRAY_TASK_COUNT=1\nbash "${@: -1}" >&2 && echo Submitted 7\n',
        "python3": f'exec {sys.executable} "$@"\n',
    }
    for name, text in programs.items():
        (log.parent / "bin" / name).write_text(f"#!/bin/bash\n{text}")
    Path(FILE).touch()
    command = ["prepare", "recipe.toml", "data.directory=../made/data", "--container", image, "--mount", "/data"]
    assert cli.main(command) == 2
    assert "name a partition with --slurm" in " ".join(capsys.readouterr().err.split())
    (log.parent / "made").mkdir()
    assert cli.main([*command, "--slurm", "main"]) == 0, capsys.readouterr().err
    assert open_prepared("../made/data").files == open_prepared(recipe_file.parent / "data").files
    here, *more = (
        str(log.parent / "work"),
        "/data",
        str(recipe_file.parent / "documents.jsonl"),
        str(log.parent / "made"),
    )
    seen = [here, *sorted(more)]
    if image == FILE:
        assert lines(log / "apptainer") == ["---", "--bind", ",".join(seen), "--pwd", here, f"{here}/{FILE}"] * 2
    else:
        mounts = ",".join(f"{path}:{path}" for path in seen)
        options = [f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={here}"]
        assert lines(log / "srun") == options * 2


def test_directories_are_mounted_once_and_where_they_lead(recipe_file, tmp_path, monkeypatch):
    for name in ("work/runs", "far/data/part"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "work" / "link").symlink_to(tmp_path / "far" / "data")
    monkeypatch.chdir(tmp_path / "work")
    recipe = load_recipe(recipe_file, ["run_directory=runs/a", "init.from=link", "data.directory=s3://bucket/data"])
    paths = [*run_directories(recipe), "link/part", "../far/data/part"]
    found = container_of("x", [str(tmp_path / "work")], paths)
    assert found and found.mounts == (str(tmp_path / "far" / "data"),)
    script = subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True)
    assert (script.returncode, script.stderr) == (0, "")
