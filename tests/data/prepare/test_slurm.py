"""Slurm jobs as submitted: a fake sbatch records its arguments, and the tests run the scripts of its jobs."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from longring.data.config import DataConfig, SourceConfig
from longring.data.format.manifest import open_prepared
from longring.data.prepare import slurm
from longring.data.prepare.job import is_listed
from longring.data.prepare.merge import ledger_file
from longring.data.prepare.prepare import prepare
from longring.data.prepare.slurm import jobs_of, submit
from rich.console import Console
from rich.progress import Progress

SBATCH = """#!/bin/bash
number=$(ls "$LOG" | wc -l)
echo "$@" > "$LOG/$number.args"
cat "${@: -1}" > "$LOG/$number.script"
[[ $(<"${@: -1}") != *"--time=never"* ]] || { echo "sbatch: error: Invalid --time specification" >&2; exit 1; }
echo "Submitted batch job $((100 + number / 2))"
"""


@pytest.mark.full
@pytest.mark.parametrize("fraction", [1.0, 0.6], ids=["every document", "a sample"])
def test_submitted_jobs_make_what_processes_make(
    make_config: Callable[..., DataConfig],
    words: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fraction: float,
):
    """Where documents are sampled, jobs of their own read the scores and list the input shards."""
    base = make_config([])
    (tmp_path / "corpus").mkdir()
    for part in range(3):
        line = f'{{"text": "{words(200, part)}"}}\n'
        (tmp_path / "corpus" / f"{part}.jsonl").write_text(line)
    source = SourceConfig(kind="json", path="corpus", sample_fraction=fraction)
    config = replace(base, source=source, input_shard_bytes=1, held_out_fraction=0.0)
    config = replace(config, directory="prepared")
    (tmp_path / "bin").mkdir()
    (tmp_path / "log").mkdir()
    for name, content in (("sbatch", SBATCH), ("scontrol", "#!/bin/bash\necho node\n")):
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.chdir(tmp_path)
    console = Console(width=200, record=True, file=(tmp_path / "screen").open("w"))
    monkeypatch.setattr(slurm, "MOST_TASKS", 2)  # a task of the array takes two of the three shards
    with pytest.raises(ValueError, match="Invalid --time specification; correct --slurm and --time"):
        submit(config, console, partition="main", workers=1, time="never")
    for file in (tmp_path / "log").iterdir():
        file.unlink()
    submit(config, console, partition="main", workers=1, time="1:00:00")

    scripts = [file.read_text() for file in (tmp_path / "log").glob("*.script")]
    jobs = [("scores", 3), ("list", 1)] * (fraction < 1) + [("prepare", 3), ("merge", 1)]
    texts = {}
    for name, _ in jobs:
        [texts[name]] = [text for text in scripts if f"job-name=longring-{name}\n" in text]
    tasks = texts["prepare"]
    assert is_listed(Path("prepared.partial")) == (fraction == 1), "nothing is read here"
    assert not list(Path("prepared.partial").glob("work/sampling/*.npy"))
    for line in ("--array=0-1%1", "--partition=main", "--time=1:00:00", "--mem-per-cpu=4G", f"--chdir={tmp_path}"):
        assert f"#SBATCH {line}\n" in tasks
    arguments = [file.read_text() for file in (tmp_path / "log").glob("*.args")]
    assert sum("--dependency=afterok:" in text for text in arguments) == len(jobs) - 1
    assert f"array job {100 if fraction == 1 else 102} with 3 tasks" in console.export_text()

    for name, count in jobs:
        for task in reversed(range(min(count, 2))):
            array = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": str(min(count, 2))}
            command = ["bash", "-c", texts[name]]
            subprocess.run(command, check=True, env={**os.environ, **array}, capture_output=True, cwd=tmp_path)
    reference = replace(config, directory="reference")
    prepare(reference, Console(quiet=True), workers=1)
    made = open_prepared("prepared")
    assert made.files == open_prepared("reference").files
    assert len(list(made.verify())) == len(made.shards)
    submit(config, console, partition="main", workers=2, time="1:00:00")
    assert "already prepared" in console.export_text()


@pytest.mark.parametrize("name", ["a b", "a;touch PWNED", "$(touch PWNED)", "a'b", "a\n#SBATCH --wrap=x", "`id`"])
def test_a_directory_that_a_shell_would_take_apart_is_refused(
    make_config: Callable[..., DataConfig], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    config = replace(make_config(["words"]), directory=name)
    with pytest.raises(ValueError, match=r"data\.directory = .*name another, or prepare without --slurm"):
        jobs_of(config, Progress(), partition="main", workers=1, time="1:00:00")
    config = replace(config, directory="plain")
    for key in ("partition", "time"):
        words = {"partition": "main", "time": "1:00:00", key: name}
        with pytest.raises(ValueError, match=r"--(slurm|time) = .*becomes a part of a shell script"):
            jobs_of(config, Progress(), workers=1, **words)


@pytest.mark.full
def test_an_array_of_the_script_and_a_merge_make_what_processes_make(words: Callable[..., str], tmp_path: Path):
    """Three array tasks, started in reverse, and a merge make the data of one job; a repeated task does nothing."""
    (tmp_path / "corpus").mkdir()
    for part in range(7):
        (tmp_path / "corpus" / f"{part}.jsonl").write_text(f'{{"text": "{words(200, part)}"}}\n')
    root = Path(__file__).parents[3]
    words_of = [
        *("data.source.kind=json", f"data.source.path={tmp_path}/corpus", "data.input_shard_bytes=1"),
        *("data.tokenizer.vocab_size=300", "data.min_bucket_tokens=8", "data.held_out_fraction=0"),
    ]

    def start(directory: str, task: int | None = None) -> subprocess.Popen[str]:
        environment = {**os.environ, "LONGRING_PYTHON": sys.executable, "SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "1"}
        if task is not None:
            array = {"ID": str(task), "COUNT": "3", "MIN": "4", "STEP": "2"}
            environment |= {f"SLURM_ARRAY_TASK_{name}": value for name, value in array.items()}
        script = [str(root / "slurm" / "prepare.sbatch"), str(root / "launch" / "recipes" / "demo.toml")]
        command = ["bash", *script, *words_of, f"data.directory={tmp_path / directory}"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    tasks = [start("prepared", task) for task in (8, 6, 4)]
    said = [task.communicate()[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0, 0], said
    done = [re.findall(r"part (\d) of 3: (\d) of 7", text) for text in said]
    assert done == [[("2", "3")], [("1", "2")], [("0", "2")]]
    assert not (tmp_path / "prepared").exists()
    assert all(ledger_file(tmp_path / "prepared.partial", number).exists() for number in range(7)), (
        "only the merge is left"
    )
    merge = start("prepared")
    assert "train" in merge.communicate()[0]
    assert merge.returncode == 0
    assert start("reference").wait() == 0
    made = open_prepared(tmp_path / "prepared")
    assert made.files == open_prepared(tmp_path / "reference").files
    again = start("prepared", 4)
    assert "already prepared" in again.communicate()[0]
