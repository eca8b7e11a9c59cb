"""`longring order`: stages of repeatable tasks, from prepared data to ordered data.

A task is done when its file is there, written under another name and renamed; so whoever is killed goes on where he
was, several machines share a stage, and what comes out does not depend on who did what. tasks.py has what a task does,
work.py where its file is.
"""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..config import DataConfig
from ..files import sha256_of
from ..format.document import NO_DOCUMENT, SPLITS
from ..format.manifest import MANIFEST_FILE, Manifest, open_prepared
from ..order_config import OrderConfig
from . import neighbors, tasks
from .finish import num_parts
from .tasks import Tell
from .work import Work


@dataclass(frozen=True)
class Stage:
    """Tasks that need all of the stages before, and none of each other."""

    name: str
    summary: str
    tasks: Callable[[Work], int]
    file: Callable[[Work, int], Path]
    """Whose presence says that a task is done."""
    do: Callable[[Work, int, Tell], object]


def order(
    data: DataConfig,
    config: OrderConfig,
    console: Console,
    *,
    workers: int = 0,
    only: str = "",
    part: tuple[int, int] = (0, 1),
) -> Manifest | None:
    """Make `config.directory`, or take it as it is when it was made from the same; return its manifest.

    `workers` processes share the work, as many as there are CPUs for 0; what they make does not depend on it. `only`
    one stage is done, of its tasks those whose number is part[0] modulo part[1], and None returned. Raises ValueError
    when the prepared data is not what `data` makes, lacks documents or has too many, the directory holds something
    else, a stage before `only` is not done, or a file of one is damaged.
    """
    if config.mode == "off":
        raise ValueError("order.mode is 'off'; set it to 'in_context' or 'fill_long_buckets', and order.directory")
    config.check(data)
    if only and only not in (names := [stage.name for stage in STAGES]):
        raise ValueError(f"--stage {only}: the stages are {', '.join(names)}")
    directory = Path(config.directory)
    prepared = open_prepared(data.directory)
    prepared.check_made_from(data)
    if directory.exists() and any(directory.iterdir()):
        if not (directory / MANIFEST_FILE).is_file():
            raise ValueError(f"order.directory = {directory} exists and is not ordered data; name another directory")
        ordered = open_prepared(directory)
        ordered.check_made_from(data, config)
        console.print(f"{directory} is already ordered by these settings; using it", soft_wrap=True)
        return ordered
    for split, books in prepared.ledger.splits.items():
        if books.dropped_tokens.total():
            raise ValueError(
                f"data.directory = {data.directory} lacks {books.dropped_tokens.total()} tokens of its {split} split; "
                "prepare it with data.rest = 'pack'"
            )
    if (records := prepared.ledger.records) >= NO_DOCUMENT:
        raise ValueError(
            f"data.directory = {data.directory} has {records} records, and ordered data numbers at most "
            f"{NO_DOCUMENT - 1}; prepare and order the sources in parts"
        )
    work = Work(data, config, sha256_of(Path(data.directory, MANIFEST_FILE)))
    columns = (
        TextColumn("{task.description:26}"),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        TextColumn("{task.fields[tasks]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress, _Processes(workers) as processes:
        for stage in STAGES:
            if only and stage.name != only:
                _require(stage, work, only)
                continue
            _run(stage, work, part, processes, progress)
            if only:
                return None
    return open_prepared(directory)


class _Processes:
    """The processes that share the tasks of all stages: started when first needed, as each imports for seconds."""

    def __init__(self, workers: int):
        self._cpus = len(os.sched_getaffinity(0))
        self._count = workers or self._cpus
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, stage: Stage, work: Work, numbers: list[int], tell: Tell) -> None:
        """Do tasks; `tell` learns how many are done, with the part of the one at hand where one process is enough."""
        if min(self._count, len(numbers)) <= 1:
            for done, number in enumerate(numbers):
                stage.do(work, number, lambda part, done=done: tell(done + part))
                tell(done + 1)
            return
        if self._pool is None:
            threads = max(1, self._cpus // self._count)
            context = get_context("forkserver")
            self._pool = ProcessPoolExecutor(self._count, context, initializer=_limit_threads, initargs=(threads,))
        # Named by its stage, as a function within one cannot travel to another process.
        begun = [self._pool.submit(do_task, stage.name, work, number) for number in numbers]
        try:
            for done, task in enumerate(as_completed(begun), start=1):
                task.result()
                tell(done)
        except BrokenProcessPool as error:
            raise OSError(
                f"order: a process of stage {stage.name} was ended from outside (memory?); the same command goes on"
            ) from error


def _require(stage: Stage, work: Work, only: str) -> None:
    count = stage.tasks(work)
    missing = sum(not stage.file(work, number).exists() for number in range(count))
    if missing:
        raise ValueError(f"--stage {only}: {stage.name} comes before and lacks {missing} of {count} tasks; do it first")


def _run(stage: Stage, work: Work, part: tuple[int, int], processes: _Processes, progress: Progress) -> None:
    mine = range(part[0], stage.tasks(work), part[1])
    left = [number for number in mine if not stage.file(work, number).exists()]
    if not mine:
        return
    before = len(mine) - len(left)
    bar = progress.add_task(stage.summary, total=len(mine), tasks="")

    def show(done: float) -> None:
        progress.update(bar, completed=done, tasks=f"{int(done):,}/{len(mine):,}" if len(mine) > 1 else "")

    show(before)
    processes.run(stage, work, left, lambda done: show(before + done))


def _limit_threads(threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = str(threads)
    neighbors.faiss.omp_set_num_threads(threads)


def do_task(stage: str, work: Work, number: int) -> None:
    """Do one task, in a process of its own."""
    next(known for known in STAGES if known.name == stage).do(work, number, lambda _: None)


def _input_shards(work: Work) -> int:
    return work.num_shards


def _one(_: Work) -> int:
    return 1


def _splits(work: Work) -> int:
    return len(work.approximate())


def _in(stage: str, name: str = "{:06d}.npy") -> Callable[[Work, int], Path]:
    return lambda work, number: work.folder(stage) / name.format(number)


def _index(name: str) -> Callable[[Work, int], Path]:
    return lambda work, number: work.index(work.approximate()[number], name)


def _filled(work: Work, number: int) -> Path:
    split, shard = tasks.fill_task(work, number)
    return work.index(split, f"{shard:06d}")


STAGES = (
    Stage("documents", "where documents lie", _input_shards, _in("documents"), tasks.find_documents),
    Stage(
        "split",
        "each split's documents",
        lambda _: 2,
        lambda w, number: w.split_file(SPLITS[number]),
        tasks.list_splits,
    ),
    Stage(
        "fit",
        "fitting the encoder",
        lambda work: int(not work.order.encoder),
        _in("embed", "encoder.npz"),
        tasks.fit_encoder,
    ),
    Stage("embed", "embedding", _input_shards, _in("embed"), tasks.embed_shard),
    Stage("train", "training the index", _splits, _index("trained"), tasks.train_index),
    Stage("fill", "filling the index", lambda work: _splits(work) * work.num_shards, _filled, tasks.fill_index),
    Stage("merge", "merging the index", _splits, _index("merged"), tasks.merge_index),
    Stage("search", "searching neighbours", _input_shards, _in("neighbors"), tasks.search_shard),
    Stage("recall", "measuring recall", _one, _in("neighbors", "recall.json"), tasks.measure_recall),
    Stage("threshold", "near-duplicates: threshold", _one, _in("duplicates", "histogram.json"), tasks.choose_threshold),
    Stage("duplicates", "near-duplicates", _input_shards, _in("duplicates"), tasks.confirm_duplicates),
    Stage("path", "the path", _one, _in("path", "path.npy"), tasks.walk_path),
    Stage("lay", "laying out contexts", _one, lambda work, _: work.partial / "work" / "parts.json", tasks.lay_contexts),
    Stage(
        "contexts",
        "writing contexts",
        lambda work: num_parts(work.partial),
        lambda work, number: work.partial / "work" / "books" / f"{number:06d}.json",
        tasks.write_part,
    ),
    Stage(
        "finish", "the manifest", _one, lambda work, _: Path(work.order.directory) / MANIFEST_FILE, tasks.write_manifest
    ),
)
"""In order; the name of each is what `--stage` takes."""
