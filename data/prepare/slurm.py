"""Preparation as Slurm jobs: an array with one task an input shard, and one that merges when all are done.

datatrove's executor submits them. Its files and every task's output are in `<directory>.slurm/`. A job that is
requeued, or the same command given again, does only what is not done.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.executor import SlurmPipelineExecutor
from rich.console import Console
from rich.progress import Progress

from ..config import DataConfig
from .merge import merge
from .prepare import PrepareStep, begin, is_prepared, partial_directory

MEMORY_GB = 4
"""Of a task. It holds a batch of documents, a block of each bucket and a packing pool, whatever the corpus."""


@dataclass(frozen=True)
class MergeStep:
    """The engine's pipeline of the last job."""

    config: DataConfig
    partial: Path

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        """Write the manifest."""
        print(merge(self.config, self.partial).ledger)


def submit(config: DataConfig, console: Console, *, partition: str, workers: int, time: str) -> None:
    """Plan the work here, training the tokenizer if there is none, and submit it; at most `workers` tasks at once.

    Raises ValueError for what `prepare` refuses, and when there is no sbatch.
    """
    if is_prepared(config):
        console.print(f"{config.directory} is already prepared from these settings")
        return
    if shutil.which("sbatch") is None:
        raise ValueError("--slurm: there is no sbatch on this machine; submit from one that has it")
    with Progress(console=console) as progress:
        tasks, merging = executors(config, progress, partition=partition, workers=workers, time=time)
    merging.run()
    console.print(
        f"submitted: array job {tasks.job_id} with {tasks.tasks} tasks, then job {merging.job_id}, which makes "
        f"{config.directory}; their output is in {tasks.logging_dir.path}",
        soft_wrap=True,
    )


def executors(
    config: DataConfig, progress: Progress, *, partition: str, workers: int, time: str
) -> tuple[SlurmPipelineExecutor, SlurmPipelineExecutor]:
    """Return the executors of the tasks and of the merge that waits for them; running the second submits both."""
    directory = Path(config.directory).absolute()
    partial = partial_directory(directory)
    count = begin(config, partial, progress)
    # Absolute, as a job starts elsewhere; without the first, the folders data/, model/ and so on of a checkout would
    # shadow packages of those names.
    environment = f"export PYTHONSAFEPATH=1 PATH={Path(sys.executable).parent}:$PATH"
    common: dict[str, Any] = {
        "time": time,
        "partition": partition,
        "mem_per_cpu_gb": MEMORY_GB,
        "qos": "",
        "env_command": environment,
        "sbatch_args": {"chdir": str(Path.cwd())},  # sources may be named relative to it
    }
    logs = directory.with_name(f"{directory.name}.slurm")
    tasks = SlurmPipelineExecutor(
        pipeline=[PrepareStep(config, partial, threads=1)],
        tasks=max(count, 1),
        workers=workers or -1,
        job_name="longring-prepare",
        logging_dir=str(logs / "tasks"),
        skip_completed=False,  # the books say what is done
        **common,
    )
    merging = SlurmPipelineExecutor(
        pipeline=[MergeStep(config, partial)],
        tasks=1,
        job_name="longring-merge",
        logging_dir=str(logs / "merge"),
        skip_completed=False,
        depends=tasks if count else None,  # only the last rename was missing
        **common,
    )
    return tasks, merging
