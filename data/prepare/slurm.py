"""Preparation as Slurm jobs: an array with one task per input shard, and a job that merges when all tasks are done.

Where sources are sampled, two jobs come first: an array that reads the scores, and one that lists the input shards with
the smallest score to keep. Their scripts and the output of every task are in `<directory>.slurm/`. A requeued job, or
the same command given again, prepares only the input shards that are not done.
"""

import pickle
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from ..config import DataConfig
from ..files import write_text
from .job import is_listed, list_inputs, listed_shard
from .merge import merge
from .prepare import PrepareStep, begin, is_prepared, open_job, partial_directory
from .sampling import keys_file, shards_to_read, write_keys

MOST_TASKS = 1000
"""Largest number of tasks of an array, below Slurm's own default of 1,001; each then takes several input shards."""
MEMORY_GB = 4
"""Memory of a task: a batch of documents, a sample of each bucket and a packing pool, whatever the corpus."""


SAMPLED = "work/sampling"
"""Folder of the list of the input shards before their sampling is known."""


@dataclass(frozen=True)
class KeysStep:
    """Step whose task `rank` reads the sampling keys of input shard `numbers[rank]`."""

    config: DataConfig
    partial: Path
    numbers: Sequence[int]

    def __call__(self, rank: int) -> None:
        """Write the keys, unless an earlier attempt has. Raises ValueError if a file cannot be read."""
        number = self.numbers[rank]
        if not keys_file(self.partial, number).exists():
            write_keys(self.config, self.partial, number, listed_shard(self.partial, number, SAMPLED))


@dataclass(frozen=True)
class ListStep:
    """Step whose only task lists the input shards, once all sampling keys are read."""

    config: DataConfig
    partial: Path

    def __call__(self, rank: int) -> None:
        """List the input shards. Raises ValueError as `begin` does."""
        with Progress() as progress:
            begin(self.config, self.partial, progress, 1)


@dataclass(frozen=True)
class MergeStep:
    """Step whose only task merges the input shards."""

    config: DataConfig
    partial: Path

    def __call__(self, rank: int) -> None:
        """Write the manifest and print the ledger. Raises ValueError as `merge` does."""
        print(merge(self.config, self.partial).ledger)


@dataclass(frozen=True)
class Job:
    """A step as a Slurm job."""

    name: str
    step: Callable[[int], None]
    tasks: int
    script: str
    """Batch script, of words that a shell leaves whole."""
    folder: Path
    """Folder of the script, the step and the output of every task."""

    def submit(self, after: str | None) -> str:
        """Submit the job, to start when job `after` is done; return its number. Raises ValueError if Slurm refuses."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "step.pickle").write_bytes(pickle.dumps((self.step, self.tasks)))
        script = self.folder / "job.sbatch"
        write_text(script, self.script)
        order = ["--dependency=afterok:" + after, "--kill-on-invalid-dep=yes"] if after else []
        done = subprocess.run(["sbatch", *order, str(script)], capture_output=True, text=True)
        number = re.search(r"\d+", done.stdout)  # of "Submitted batch job 1234"
        if done.returncode or number is None:
            said = (done.stderr or done.stdout).strip() or "no number of a job"
            raise ValueError(f"sbatch {script}: {said}; correct --slurm and --time, and give the command again")
        return number[0]


def run_task(file: Path, index: int, count: int) -> None:
    """Run tasks index, index + count, ... of the step in `file`, the part of one of `count` tasks of an array."""
    step, tasks = pickle.loads(file.read_bytes())
    for rank in range(index, tasks, count):
        step(rank)


def submit(
    config: DataConfig, console: Console, *, partition: str, workers: int, time: str, container: Sequence[str] = ()
) -> None:
    """List the input shards and make the tokenizer here, and submit the jobs; at most `workers` tasks run at once.

    `time` is the limit of a task. `container` has the words before a command that run it in a container. Raises
    ValueError as `prepare` does, and if there is no sbatch or it refuses a job.
    """
    if is_prepared(config):
        console.print(f"{config.directory} is already prepared from these settings", markup=False)
        return
    if shutil.which("sbatch") is None:
        raise ValueError(
            f"--slurm {partition}: there is no sbatch on this machine; submit from one that has it, or "
            "prepare here without --slurm"
        )
    with Progress(console=console) as progress:
        jobs = jobs_of(config, progress, partition=partition, workers=workers, time=time, container=container)
    numbers: dict[str, str] = {}
    for job in jobs:
        numbers[job.name] = job.submit(after=[*numbers.values()][-1] if numbers else None)
    array = next((job for job in jobs if job.name == "prepare"), None)
    told = f"array job {numbers['prepare']} with {array.tasks} tasks, then " if array else ""
    console.print(
        f"submitted: {told}job {numbers['merge']}, which makes {config.directory}; the output of all jobs is in "
        f"{jobs[-1].folder.parent}",
        soft_wrap=True,
        markup=False,
    )


def jobs_of(
    config: DataConfig,
    progress: Progress,
    *,
    partition: str,
    workers: int,
    time: str,
    container: Sequence[str] = (),
) -> list[Job]:
    """Return the jobs in their order, each of which waits for the one before it; the last one merges.

    Tasks run by this Python, or by that of the container, which sees all directories by the same names. Raises
    ValueError as `open_job` does, and for a text that the shell or sbatch would read as more than one word.
    """
    directory = Path(config.directory).absolute()
    named = {"data.directory": directory, "working directory": Path.cwd(), "python": Path(sys.executable)}
    for key, text in {**named, "--slurm": partition, "--time": time}.items():
        if shlex.quote(str(text)) != str(text):
            raise ValueError(
                f"{key} = {str(text)!r}: becomes a part of a shell script, so it must consist of letters, digits and "
                "@%+=:,./-_; name another, or prepare without --slurm"
            )
    partial = partial_directory(directory)
    inputs, first = open_job(config, partial, progress)
    numbers, to_read = range(first, len(inputs)), shards_to_read(config, inputs, first)
    logs = directory.with_name(f"{directory.name}.slurm")

    def job(name: str, step: Callable[[int], None], tasks: int = 1) -> Job:
        folder, array = logs / name, min(tasks, MOST_TASKS)
        options = {
            "job-name": f"longring-{name}",
            "partition": partition,
            "time": time,
            "cpus-per-task": "1",
            "mem-per-cpu": f"{MEMORY_GB}G",
            "array": f"0-{array - 1}" + (f"%{workers}" if workers else ""),  # %N: at most N tasks at once
            "chdir": str(Path.cwd()),  # paths of sources may be relative to it
            "output": f"{folder}/%A_%a.out",
        }
        lines = ["#!/bin/bash", *(f"#SBATCH --{name}={value}" for name, value in options.items()), "#SBATCH --requeue"]
        # Without PYTHONSAFEPATH the folders data/, model/ and so on of a checkout would shadow packages of those names.
        python = shlex.join([*container, "python3"]) if container else sys.executable
        command = f"exec {python} -m longring.data.prepare.slurm_task {folder}/step.pickle"
        lines += ["export PYTHONSAFEPATH=1", f'{command} "$SLURM_ARRAY_TASK_ID" "$SLURM_ARRAY_TASK_COUNT"']
        return Job(name, step, tasks, "\n".join(lines) + "\n", folder)

    jobs = []
    if not is_listed(partial) and to_read:
        list_inputs(partial, inputs, SAMPLED)
        jobs += [job("scores", KeysStep(config, partial, tuple(to_read)), len(to_read))]
        jobs += [job("list", ListStep(config, partial))]
    elif not is_listed(partial) and inputs:
        list_inputs(partial, inputs)
    # Without input shards left, only the last renames are missing.
    jobs += [job("prepare", PrepareStep(config, partial, numbers, threads=1), len(numbers))] if numbers else []
    return [*jobs, job("merge", MergeStep(config, partial))]
