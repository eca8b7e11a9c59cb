"""`longring order`: the stages that turn prepared data into ordered data, and the processes that share their tasks.

A task is done when its file exists; the file is written under another name and renamed. A run that was killed therefore
continues where it stopped, several machines can share a stage, and the result does not depend on the division of the
tasks. The tasks are in tasks.py, their files in work_directory.py.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..config import DataConfig
from ..files import full_disk_named, read_patiently, sha256_of
from ..format.document import NO_DOCUMENT, SPLITS
from ..format.manifest import MANIFEST_FILE, Manifest, open_prepared
from ..lock import HeldError, held
from ..order_config import OrderConfig
from ..prepare.merge import ledger_file, restore_parts
from ..processes import process_pool
from . import neighbors, tasks
from .finish import parts_of
from .tasks import OnProgress
from .work_directory import WorkDirectory


@dataclass(frozen=True)
class Stage:
    """Stage of an ordering: tasks that depend on all earlier stages, and not on each other."""

    name: str
    """Name of the stage for `--stage`."""
    summary: str
    """Text beside the stage's progress bar."""
    tasks: Callable[[WorkDirectory], int]
    """Function that returns the number of tasks."""
    file: Callable[[WorkDirectory, int], Path]
    """Function that returns the file of a task, which exists once the task is done."""
    do: Callable[[WorkDirectory, int, OnProgress], object]
    """Function that does a task."""


def order(
    data: DataConfig,
    config: OrderConfig,
    console: Console,
    *,
    workers: int = 0,
    only: str = "",
    part: tuple[int, int] = (0, 1),
    verify: bool = False,
) -> Manifest | None:
    """Make the ordered data of `config.directory`, or repair it if its settings are the same; return its manifest.

    `workers` processes share the tasks; 0: one for each CPU. The result does not depend on their number. With `only`,
    run the tasks I, I + N, I + 2N, ... of that stage alone, for `part` = (I, N), and return None. Shards of finished
    data that are missing or have another size are made again; with `verify` every shard is read, and those with another
    SHA-256 are made again too.

    Raises ValueError if the prepared data was made with other settings than `data`, lacks documents or has too many; if
    the directory holds something else; if another process orders this data; if a stage before `only` is not done; or if
    the file of a stage is damaged. Raises OSError if the disk is full; the same command continues.
    """
    if config.mode == "off":
        raise ValueError(
            "order.mode = 'off': nothing to order; set it to 'in_context' or 'fill_long_buckets', and order.directory"
        )
    config.check(data)
    if only and only not in (names := [stage.name for stage in STAGES]):
        raise ValueError(f"--stage {only}: not a stage; name one of {', '.join(names)}")
    prepared = open_prepared(data.directory)
    prepared.check_made_from(data)
    ordered = _finished(data, config)
    damaged = sorted({number for number, _ in ordered.damaged_shards(verify=verify)}) if ordered is not None else []
    if ordered is not None and not damaged:
        console.print(f"{config.directory} is already ordered by these settings; using it", soft_wrap=True)
        return ordered
    if ordered is not None and only:
        ordered.check_sizes()  # raises, as a repair takes all stages
    _check_number(data, prepared)
    manifest_file = Path(data.directory, MANIFEST_FILE)
    directory = WorkDirectory(data, config, read_patiently(manifest_file, lambda: sha256_of(manifest_file)))
    with ExitStack() as stack:
        stack.enter_context(full_disk_named(directory.partial))
        if not only:
            # Not for a single stage: several machines may share it.
            stack.enter_context(_held(directory))
        progress = stack.enter_context(_progress_bars(console))
        processes = stack.enter_context(_Processes(workers))
        for stage in STAGES:
            if only and stage.name != only:
                _require(stage, directory, only)
                continue
            # A repair writes the damaged parts again; the files of earlier stages that are gone are made first.
            if ordered is not None and stage.name == "contexts":
                _run(stage, directory, damaged, processes, progress)
                restore_parts(directory.partial, ordered, Path(config.directory), damaged)
                break
            _run(stage, directory, range(part[0], stage.tasks(directory), part[1]), processes, progress)
            if only:
                return None
    return open_prepared(config.directory)


def _progress_bars(console: Console) -> Progress:
    """Return a display with room for one bar a stage."""
    columns = (
        TextColumn("{task.description:26}"),
        BarColumn(bar_width=14),
        TaskProgressColumn(),
        TextColumn("{task.fields[tasks]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


@contextmanager
def _held(directory: WorkDirectory) -> Iterator[None]:
    """Hold the lock of a work directory. Raises ValueError if another process holds it."""
    try:
        with held(directory.root / "lock"):
            yield
    except HeldError as error:
        raise ValueError(
            f"order.work_directory = {directory.root}: is used by {error}; wait for it or end it, or name another one"
        ) from error


def _finished(data: DataConfig, config: OrderConfig) -> Manifest | None:
    """Return the finished data of `config.directory`, perhaps with damaged shards, or None if there is nothing yet.

    Raises ValueError if the directory holds something else or data of other settings.
    """
    directory = Path(config.directory)
    if not directory.exists() or not any(directory.iterdir()):
        return None
    if not (directory / MANIFEST_FILE).is_file():
        raise ValueError(
            f"order.directory = {directory}: exists and is not ordered data; name another directory, or "
            "delete this one if nothing in it is needed"
        )
    ordered = open_prepared(directory, check_shards=False)
    ordered.check_made_from(data, config)
    return ordered


def _check_number(data: DataConfig, prepared: Manifest) -> None:
    """Raise ValueError if the prepared data has too many records to number."""
    if (records := prepared.ledger.records) >= NO_DOCUMENT:
        raise ValueError(
            f"data.directory = {data.directory}: has {records} records, and ordered data numbers at most "
            f"{NO_DOCUMENT - 1}; prepare and order the sources in parts"
        )


class _Processes:
    """Pool of processes that share the tasks of all stages; it starts when first needed, as imports take seconds."""

    def __init__(self, workers: int):
        self._cpus = len(os.sched_getaffinity(0))
        self._count = workers or self._cpus
        self._pool: ProcessPoolExecutor | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stack.__exit__(exc_type, exc, tb)

    def run(self, stage: Stage, directory: WorkDirectory, numbers: list[int], on_progress: OnProgress) -> None:
        """Do the tasks `numbers` of a stage.

        `on_progress` gets the number of tasks done, with the fraction of the current one if a single process does them
        all. Raises OSError if a process is killed.
        """
        if min(self._count, len(numbers)) <= 1:
            for done, number in enumerate(numbers):
                stage.do(directory, number, lambda part, done=done: on_progress(done + part))
                on_progress(done + 1)
            return
        if self._pool is None:
            threads = max(1, self._cpus // self._count)
            self._pool = self._stack.enter_context(process_pool(self._count, _limit_threads, threads))
        # A process gets the name of the stage: the functions of a Stage are lambdas, which cannot be pickled.
        begun = [self._pool.submit(do_task, stage.name, directory, number) for number in numbers]
        try:
            for done, task in enumerate(as_completed(begun), start=1):
                task.result()
                on_progress(done)
        except BrokenProcessPool as error:
            raise OSError(
                f"order: a process of stage {stage.name} was killed from outside, perhaps for memory; run the same "
                "command again, with fewer --workers if memory was short"
            ) from error


def _require(stage: Stage, directory: WorkDirectory, only: str) -> None:
    """Raise ValueError unless all tasks of `stage`, which comes before stage `only`, are done."""
    # An earlier stage may still run on another machine, so its files are counted and not taken for granted.
    count = stage.tasks(directory)
    missing = sum(not stage.file(directory, number).exists() for number in range(count))
    if missing:
        raise ValueError(
            f"--stage {only}: stage {stage.name} comes before it and lacks {missing} of {count} tasks; "
            f"run --stage {stage.name} first"
        )


def _run(
    stage: Stage, directory: WorkDirectory, mine: Sequence[int], processes: _Processes, progress: Progress
) -> None:
    """Do the tasks `mine` of a stage that are not done, with a progress bar."""
    # Another machine may share the stage: what it has done by now is not done again.
    left = [number for number in mine if not stage.file(directory, number).exists()]
    if not mine:
        return
    done_before = len(mine) - len(left)
    bar = progress.add_task(stage.summary, total=len(mine), tasks="")

    def show(done: float) -> None:
        progress.update(bar, completed=done, tasks=f"{int(done):,}/{len(mine):,}" if len(mine) > 1 else "")

    show(done_before)
    processes.run(stage, directory, left, lambda done: show(done_before + done))


def _limit_threads(threads: int) -> None:
    """Let this process use `threads` threads, so that all processes together use each CPU once."""
    os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = str(threads)
    neighbors.faiss.omp_set_num_threads(threads)


def do_task(stage: str, directory: WorkDirectory, number: int) -> None:
    """Do one task; this is the entry of the worker processes."""
    next(known for known in STAGES if known.name == stage).do(directory, number, lambda _: None)


def _input_shards(directory: WorkDirectory) -> int:
    return directory.num_shards


def _one(_: WorkDirectory) -> int:
    return 1


def _groups(directory: WorkDirectory) -> int:
    return len(directory.approximate())


def _in(stage: str, name: str = "{:06d}.npy") -> Callable[[WorkDirectory, int], Path]:
    return lambda directory, number: directory.folder(stage) / name.format(number)


def _index(name: str) -> Callable[[WorkDirectory, int], Path]:
    return lambda directory, number: directory.index(directory.approximate()[number], name)


def _filled(directory: WorkDirectory, number: int) -> Path:
    group, shard = tasks.fill_tasks(directory)[number]
    return directory.index(group, f"{shard:06d}")


STAGES = (
    Stage("documents", "tables of documents", _input_shards, _in("documents"), tasks.find_documents),
    Stage(
        "split",
        "documents of each split",
        lambda _: 2,
        lambda directory, number: directory.split_file(SPLITS[number]),
        tasks.list_splits,
    ),
    Stage(
        "fit",
        "fitting the encoder",
        lambda directory: int(not directory.order.encoder),
        _in("embed", "encoder.npz"),
        tasks.fit_encoder,
    ),
    Stage("embed", "embedding", _input_shards, _in("embed"), tasks.embed_shard),
    # Only a group with more than `exact_documents` documents has an index: the next three stages may have no task.
    Stage("train", "training the index", _groups, _index("trained"), tasks.train_index),
    Stage("fill", "filling the index", lambda directory: len(tasks.fill_tasks(directory)), _filled, tasks.fill_index),
    Stage("merge", "merging the index", _groups, _index("merged"), tasks.merge_index),
    Stage("search", "searching neighbours", _input_shards, _in("neighbors"), tasks.search_shard),
    Stage("recall", "measuring recall", _one, _in("neighbors", "recall.json"), tasks.measure_recall),
    Stage("threshold", "near-duplicates: threshold", _one, _in("duplicates", "histogram.json"), tasks.choose_threshold),
    Stage("duplicates", "near-duplicates", _input_shards, _in("duplicates"), tasks.confirm_duplicates),
    Stage("path", "the path", _one, _in("path", "path.npy"), tasks.walk_path),
    Stage(
        "lay",
        "laying out contexts",
        _one,
        lambda directory, _: directory.partial / "work" / "parts.json",
        tasks.lay_contexts,
    ),
    Stage(
        "contexts",
        "writing contexts",
        lambda directory: sum(parts_of(directory.partial)),
        lambda directory, number: ledger_file(directory.partial, number),
        tasks.write_part,
    ),
    Stage(
        "finish",
        "the manifest",
        _one,
        lambda directory, _: Path(directory.order.directory) / MANIFEST_FILE,
        tasks.write_manifest,
    ),
)
"""All stages, in order."""
