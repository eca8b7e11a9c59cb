"""Preparation as Slurm jobs: an array with one task per input shard, and a job that merges when all tasks are done.

datatrove's executor submits them. Its files and the output of every task are in `<directory>.slurm/`. A requeued job,
or the same command given again, prepares only the input shards that are not done.
"""

import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.executor import SlurmPipelineExecutor
from loguru import logger
from rich.console import Console
from rich.progress import Progress

from ..config import DataConfig
from .merge import merge
from .prepare import PrepareStep, begin, is_prepared, partial_directory

# datatrove would log over the progress bar; it raises its errors as well.
logger.disable("datatrove")

MEMORY_GB = 4
"""Memory of a task: a batch of documents, a sample of each bucket and a packing pool, whatever the corpus."""


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
    """Return the executors of the tasks and of the merge, which depends on them: running the second submits both.

    Raises ValueError as `begin` does, and for a text that the shell or sbatch would read as more than one word.
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
    numbers = begin(config, partial, progress)
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
    tasks = SlurmPipelineExecutor(
        pipeline=[PrepareStep(config, partial, numbers, threads=1)],
        tasks=max(len(numbers), 1),
        workers=workers or -1,
        job_name="longring-prepare",
        logging_dir=str(logs / "tasks"),
        skip_completed=False,  # the ledgers say which are done
        **common,
    )
    merging = SlurmPipelineExecutor(
        pipeline=[MergeStep(config, partial)],
        tasks=1,
        job_name="longring-merge",
        logging_dir=str(logs / "merge"),
        skip_completed=False,
        depends=tasks if numbers else None,  # without tasks, only the last renames are missing
        **common,
    )
    return tasks, merging
