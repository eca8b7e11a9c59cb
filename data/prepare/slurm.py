"""Preparation as Slurm jobs: an array with one task per input shard, and a job that merges when all tasks are done.

Where sources are sampled, two jobs come first: an array that reads the scores, and one that lists the input shards with
the smallest score to keep. datatrove's executor submits them. Its files and the output of every task are in
`<directory>.slurm/`. A requeued job, or the same command given again, prepares only the input shards that are not done.
"""

import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.executor import SlurmPipelineExecutor
from loguru import logger
from rich.console import Console
from rich.progress import Progress

from ..config import DataConfig
from .job import is_listed, list_inputs, listed_shard
from .merge import merge
from .prepare import PrepareStep, begin, is_prepared, open_job, partial_directory
from .sampling import keys_file, shards_to_read, write_keys

# datatrove would log over the progress bar; it raises its errors as well.
logger.disable("datatrove")

MEMORY_GB = 4
"""Memory of a task: a batch of documents, a sample of each bucket and a packing pool, whatever the corpus."""


SAMPLED = "work/sampling"
"""Folder of the list of the input shards before their sampling is known."""


@dataclass(frozen=True)
class KeysStep:
    """Pipeline of a datatrove executor whose task `rank` reads the sampling keys of input shard `numbers[rank]`."""

    config: DataConfig
    partial: Path
    numbers: Sequence[int]

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        """Write the keys, unless an earlier attempt has. Raises ValueError if a file cannot be read."""
        number = self.numbers[rank]
        if not keys_file(self.partial, number).exists():
            write_keys(self.config, self.partial, number, listed_shard(self.partial, number, SAMPLED))


@dataclass(frozen=True)
class ListStep:
    """Pipeline of a datatrove executor whose only task lists the input shards, once all sampling keys are read."""

    config: DataConfig
    partial: Path

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        """List the input shards. Raises ValueError as `begin` does."""
        with Progress() as progress:
            begin(self.config, self.partial, progress, 1)


@dataclass(frozen=True)
class MergeStep:
    """Pipeline of a datatrove executor whose only task merges the input shards."""

    config: DataConfig
    partial: Path

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        """Write the manifest and print the ledger. Raises ValueError as `merge` does."""
        print(merge(self.config, self.partial).ledger)


def submit(config: DataConfig, console: Console, *, partition: str, workers: int, time: str) -> None:
    """List the input shards and make the tokenizer here, and submit the jobs; at most `workers` tasks run at once.

    `time` is the limit of a task. Raises ValueError as `prepare` does, and if there is no sbatch.
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
        tasks, merging = executors(config, progress, partition=partition, workers=workers, time=time)
    merging.run()
    console.print(
        f"submitted: array job {tasks.job_id} with {tasks.tasks} tasks, then job {merging.job_id}, which makes "
        f"{config.directory}; their output is in {tasks.logging_dir.path}",
        soft_wrap=True,
        markup=False,
    )


def executors(
    config: DataConfig, progress: Progress, *, partition: str, workers: int, time: str
) -> tuple[SlurmPipelineExecutor, SlurmPipelineExecutor]:
    """Return the executors of the tasks and of the merge, which depends on them: running the second submits all jobs.

    Raises ValueError as `open_job` does, and for a text that the shell or sbatch would read as more than one word.
    """
    directory = Path(config.directory).absolute()
    python = Path(sys.executable).parent
    named = {"data.directory": directory, "working directory": Path.cwd(), "python": python}
    for key, text in {**named, "--slurm": partition, "--time": time}.items():
        # datatrove writes them into the script of a job as they are.
        if shlex.quote(str(text)) != str(text):
            raise ValueError(
                f"{key} = {str(text)!r}: becomes a part of a shell script, so it must consist of letters, digits and "
                "@%+=:,./-_; name another, or prepare without --slurm"
            )
    partial = partial_directory(directory)
    inputs, first = open_job(config, partial, progress)
    numbers, to_read = range(first, len(inputs)), shards_to_read(config, inputs, first)
    # Without PYTHONSAFEPATH the folders data/, model/ and so on of a checkout would shadow packages of those names.
    environment = f"export PYTHONSAFEPATH=1 PATH={python}:$PATH"
    common: dict[str, Any] = {
        "time": time,
        "partition": partition,
        "mem_per_cpu_gb": MEMORY_GB,
        "qos": "",
        "env_command": environment,
        "sbatch_args": {"chdir": str(Path.cwd())},  # paths of sources may be relative to it
    }
    logs = directory.with_name(f"{directory.name}.slurm")

    def job(name: str, step: Any, tasks: int = 1, **settings: Any) -> SlurmPipelineExecutor:
        return SlurmPipelineExecutor(
            pipeline=[step],
            tasks=tasks,
            job_name=f"longring-{name}",
            logging_dir=str(logs / name),
            skip_completed=False,  # the files of a step say what is done
            **common,
            **settings,
        )

    at_once, listing = workers or -1, None
    if not is_listed(partial) and to_read:
        list_inputs(partial, inputs, SAMPLED)
        reading = job("scores", KeysStep(config, partial, tuple(to_read)), len(to_read), workers=at_once)
        listing = job("list", ListStep(config, partial), depends=reading)
    elif not is_listed(partial) and inputs:
        list_inputs(partial, inputs)
    preparing = PrepareStep(config, partial, numbers, threads=1)
    tasks = job("prepare", preparing, max(len(numbers), 1), workers=at_once, depends=listing)
    # Without tasks, only the last renames are missing.
    return tasks, job("merge", MergeStep(config, partial), depends=tasks if numbers else None)
