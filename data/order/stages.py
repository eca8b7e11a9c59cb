"""`longring order`: stages of repeatable tasks, from prepared data to ordered data.

A task is done when its file is there, written under another name and renamed; so whoever is killed goes on where he
was, several machines share a stage, and what comes out does not depend on who did what. What a stage makes lies in the
work directory, in a folder named by a hash of the settings that decide it and of the folder it was made from: another
choice of contexts finds embeddings, neighbours and path as they were.

    <data.directory>.order/
      documents-<hash>/000012.npy     where the documents of input shard 12 lie
      embed-<hash>/000012.npy         their vectors, float16; encoder.npz, the fitted default encoder
      neighbors-<hash>/000012.npy     their neighbours; the index, its parts, recall.json
      duplicates-<hash>/000012.npy    near-duplicate pairs; histogram.json
      path-<hash>/path.npy            the path
    <order.directory>.partial/        layout, shards, and at last the manifest
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..config import DataConfig
from ..decompose import SPLITS, Split
from ..input_shard import write_whole
from ..manifest import MANIFEST_FILE, Manifest, open_prepared
from ..prepare import partial_directory
from ..shards import sha256_of
from . import duplicates, embed, neighbors, path
from .config import OrderConfig
from .documents import Documents, opened, save, write_tables
from .finish import finish, lay, make_part, num_parts

NEIGHBOR_FIELDS = ("ids", "cosines")


@dataclass(frozen=True)
class Work:
    """What all tasks know: settings, and the data they are for."""

    data: DataConfig
    order: OrderConfig
    manifest_sha256: str

    def folder(self, stage: str) -> Path:
        """Return where a stage's files are: named by the settings that decide them, and by those of the one before."""
        order = self.order
        decides: dict[str, tuple[Any, ...]] = {
            "documents": (),
            "embed": (order.encoder, order.embedding_dimensions, order.long_documents, order.window_tokens),
            "neighbors": (order.neighbors, order.exact_documents),
            "duplicates": (order.duplicate_similarity, order.duplicate_overlap),
            "path": (order.by, order.seed if order.by != "path" else None),
        }
        key = self.manifest_sha256
        for name, settings in decides.items():
            key = hashlib.sha256(json.dumps([key, settings]).encode()).hexdigest()
            if name == stage:
                break
        root = Path(order.work_directory or f"{self.data.directory}.order")
        return root / f"{stage}-{key[:12]}"

    @property
    def partial(self) -> Path:
        """Where the ordered data grows."""
        return partial_directory(Path(self.order.directory))

    def documents(self) -> Documents:
        """Return the documents, once their tables are there."""
        return opened(self.data.directory, self.folder("documents"))

    def embeddings(self) -> neighbors.Embeddings:
        """Return the vectors, once they are there."""
        return neighbors.opened(self.folder("embed"), tuple(self.documents().first.tolist()))

    def split_numbers(self, held_out: bool) -> NDArray[np.int64]:
        """Return the split's documents."""
        return np.flatnonzero(self.documents().column("held_out") == held_out)

    def approximate(self) -> list[Split]:
        """Return the splits that are too large to be searched exactly."""
        books = self.documents().manifest.ledger.splits
        return [split for split in SPLITS if books[split].documents > self.order.exact_documents]

    def lists(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]]]:
        """Yield each input shard's documents [n] with their neighbours' numbers and cosines [n, k]."""
        for number in range(self.documents().num_shards):
            yield self.neighbor_list(number)

    def neighbor_list(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]]:
        """Return one input shard's of them."""
        found = np.load(self.folder("neighbors") / f"{number:06d}.npy", mmap_mode="r")
        return np.array(self.documents().of_shard(number)), *(found[field] for field in NEIGHBOR_FIELDS)

    def left_out(self) -> NDArray[np.uint32]:
        """Return (near-duplicate left out, document kept) of all near-duplicates."""
        folder, count = self.folder("duplicates"), self.documents().num_shards
        pairs = np.concatenate([np.load(folder / f"{number:06d}.npy") for number in range(count)])
        return duplicates.left_out(pairs, len(self.documents()))


@dataclass(frozen=True)
class Stage:
    """Tasks that need all of the stages before, and none of each other."""

    name: str
    summary: str
    tasks: Callable[[Work], int]
    file: Callable[[Work, int], Path]
    """Whose presence says that a task is done."""
    do: Callable[[Work, int], object]


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
    when the prepared data is not what `data` makes or lacks documents, the directory holds something else, or a stage
    before `only` is not done.
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
    work = Work(data, config, sha256_of(Path(data.directory, MANIFEST_FILE)))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
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

    def run(self, stage: Stage, work: Work, numbers: list[int]) -> Iterator[int]:
        """Do tasks, yielding each one's number when it is done; here where one process is enough."""
        if min(self._count, len(numbers)) <= 1:
            for number in numbers:
                stage.do(work, number)
                yield number
            return
        if self._pool is None:
            threads = max(1, self._cpus // self._count)
            context = get_context("forkserver")
            self._pool = ProcessPoolExecutor(self._count, context, initializer=_limit_threads, initargs=(threads,))
        # Named by its stage, as a function within one cannot travel to another process.
        tasks = {self._pool.submit(do_task, stage.name, work, number): number for number in numbers}
        try:
            for done in as_completed(tasks):
                done.result()
                yield tasks[done]
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
    count = stage.tasks(work)
    mine = range(part[0], count, part[1])
    left = [number for number in mine if not stage.file(work, number).exists()]
    bar = progress.add_task(stage.summary, total=len(mine), completed=len(mine) - len(left))
    for _ in processes.run(stage, work, left):
        progress.advance(bar)


def _limit_threads(threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = str(threads)
    neighbors.faiss.omp_set_num_threads(threads)


def do_task(stage: str, work: Work, number: int) -> None:
    """Do one task, in a process of its own."""
    next(known for known in STAGES if known.name == stage).do(work, number)


def _save_json(file: Path, content: Any) -> None:
    write_whole(file, lambda begun: begun.write_text(json.dumps(content) + "\n"))


def _write_tables(work: Work, number: int) -> None:
    write_tables(open_prepared(work.data.directory, check_shards=False), work.folder("documents"), number)


def _fit(work: Work, _: int) -> None:
    write_whole(work.folder("embed") / "encoder.npz", partial(embed.fit, work.documents(), work.order))


def _embed(work: Work, number: int) -> None:
    documents = work.documents()
    encoder = embed.make_encoder(work.order, work.folder("embed") / "encoder.npz", number)
    vectors = list(encoder.encode(documents, documents.of_shard(number)))
    found = np.concatenate(vectors) if vectors else np.empty((0, work.order.embedding_dimensions), dtype=np.float32)
    # Half precision is enough for a cosine to three digits, and halves what the search reads.
    save(work.folder("embed") / f"{number:06d}.npy", found.astype(np.float16))


def _index(work: Work, split: Split, name: str) -> Path:
    return work.folder("neighbors") / f"{split}-{name}.faiss"


def _train(work: Work, number: int) -> None:
    split = work.approximate()[number]
    chosen = work.split_numbers(split == "held_out")
    write_whole(_index(work, split, "trained"), lambda file: neighbors.train_index(work.embeddings(), chosen, file))


def _fill_task(work: Work, number: int) -> tuple[Split, int]:
    split, shard = divmod(number, work.documents().num_shards)
    return work.approximate()[split], shard


def _fill(work: Work, number: int) -> None:
    split, shard = _fill_task(work, number)
    numbers = np.array(work.documents().of_shard(shard), dtype=np.int64)
    numbers = numbers[work.documents().shard_column(shard, "held_out") == (split == "held_out")]
    trained, vectors = _index(work, split, "trained"), work.embeddings()[numbers]
    write_whole(_index(work, split, f"{shard:06d}"), lambda file: neighbors.fill_index(trained, vectors, numbers, file))


def _merge(work: Work, number: int) -> None:
    split = work.approximate()[number]
    parts = [_index(work, split, f"{shard:06d}") for shard in range(work.documents().num_shards)]
    neighbors.merge_index(_index(work, split, "trained"), parts, _index(work, split, "merged"))


def _search(work: Work, number: int) -> None:
    documents, embeddings, count = work.documents(), work.embeddings(), work.order.neighbors
    numbers = np.array(documents.of_shard(number), dtype=np.int64)
    found = np.empty(len(numbers), dtype=[("ids", "<u4", (count,)), ("cosines", "<f4", (count,))])
    held_out = documents.shard_column(number, "held_out")
    for split in SPLITS:
        here = held_out == (split == "held_out")
        exact = split not in work.approximate()
        if exact:
            index = neighbors.exact_index(embeddings, work.split_numbers(split == "held_out"))
        else:
            index = neighbors.merged_index(_index(work, split, "merged"))
        ids, cosines = neighbors.nearest(index, embeddings, numbers[here], count, exact=exact)
        found["ids"][here], found["cosines"][here] = ids, cosines
    save(work.folder("neighbors") / f"{number:06d}.npy", found)


def _recall(work: Work, _: int) -> None:
    documents = work.documents()
    ids = [ids for _, ids, _ in work.lists()]

    def found_of(document: int) -> NDArray[np.uint32]:
        shard, inside = documents.place(document)
        return ids[shard][inside]

    measured = {
        split: neighbors.recall(
            work.embeddings(), work.split_numbers(split == "held_out"), found_of, work.order.neighbors
        )
        for split in SPLITS
    }
    _save_json(work.folder("neighbors") / "recall.json", {"recall": measured, "approximate": work.approximate()})


def _threshold(work: Work, _: int) -> None:
    order, documents = work.order, work.documents()
    histogram = duplicates.histogram(work.lists(), _inside(documents), order.duplicate_overlap)
    chosen = order.duplicate_similarity or histogram.threshold()
    _save_json(
        work.folder("duplicates") / "histogram.json",
        {
            "threshold": chosen if order.duplicate_overlap else 1.01,
            "cosine_from": duplicates.bin_edges(),
            **{name: counts.tolist() for name, counts in histogram._asdict().items()},
        },
    )


def _duplicates(work: Work, number: int) -> None:
    folder = work.folder("duplicates")
    threshold = json.loads((folder / "histogram.json").read_text())["threshold"]
    lists, tokens = work.neighbor_list(number), _inside(work.documents())
    save(
        folder / f"{number:06d}.npy",
        duplicates.confirmed_pairs(*lists, tokens, threshold, work.order.duplicate_overlap),
    )


def _inside(documents: Documents) -> duplicates.Tokens:
    return lambda number: documents.tokens(number)[1:-1]


def _path(work: Work, _: int) -> None:
    count = len(work.documents())
    dropped = np.zeros(count, dtype=np.bool_)
    dropped[work.left_out()[:, 0]] = True
    folder = work.folder("path")
    steps = np.empty(count - int(np.count_nonzero(dropped)), dtype=path.STEP_DTYPE)
    if work.order.by == "random":
        steps["document"] = path.random_order(count, dropped, work.order.seed)
    else:
        ids = np.empty((count, work.order.neighbors), dtype=np.uint32)
        cosines = np.empty(ids.shape, dtype=np.float32)
        for documents, some_ids, some_cosines in work.lists():
            ids[documents], cosines[documents] = some_ids, some_cosines
        path.leave_out(ids, dropped)
        if work.order.by == "knn":
            steps["document"] = path.nearest_groups(ids, dropped, work.order.seed)
        else:
            for _done in path.greedy_path(path.make_graph(ids, cosines), dropped, folder / "path.steps"):
                pass
            steps = np.fromfile(folder / "path.steps", dtype=path.STEP_DTYPE)
    if work.order.by != "path":
        # The baselines' steps are none of the graph's: their cosines come from the vectors.
        vectors = work.embeddings()
        steps["similarity"][:1] = np.nan
        for start in range(1, len(steps), 1 << 16):
            some = steps["document"][start - 1 : start + (1 << 16)].astype(np.int64)
            here = vectors[some]
            steps["similarity"][start : start + len(some) - 1] = np.einsum("nd,nd->n", here[1:], here[:-1])
    save(folder / "path.npy", steps)
    (folder / "path.steps").unlink(missing_ok=True)


def _lay(work: Work, _: int) -> None:
    steps = np.load(work.folder("path") / "path.npy")
    lay(work.data, work.order, work.documents(), steps["document"], work.partial)


def _make_part(work: Work, number: int) -> None:
    make_part(work.data, work.order, work.documents(), work.partial, number)


def _finish(work: Work, _: int) -> None:
    finish(
        work.data,
        work.order,
        work.documents(),
        work.embeddings(),
        partial=work.partial,
        left_out=work.left_out(),
        path=np.load(work.folder("path") / "path.npy"),
        lists=work.lists(),
        measured={
            **json.loads((work.folder("neighbors") / "recall.json").read_text()),
            "duplicates": json.loads((work.folder("duplicates") / "histogram.json").read_text()),
        },
    )


def _input_shards(work: Work) -> int:
    return sum(open_prepared(work.data.directory, check_shards=False).sources.values())


def _one(_: Work) -> int:
    return 1


def _in(stage: str, name: str = "{:06d}.npy") -> Callable[[Work, int], Path]:
    return lambda work, number: work.folder(stage) / name.format(number)


STAGES = (
    Stage("documents", "where documents lie", _input_shards, _in("documents"), _write_tables),
    Stage("fit", "fitting the encoder", lambda work: int(not work.order.encoder), _in("embed", "encoder.npz"), _fit),
    Stage("embed", "embedding", _input_shards, _in("embed"), _embed),
    Stage(
        "train",
        "training the index",
        lambda work: len(work.approximate()),
        lambda work, number: _index(work, work.approximate()[number], "trained"),
        _train,
    ),
    Stage(
        "fill",
        "filling the index",
        lambda work: len(work.approximate()) * work.documents().num_shards,
        lambda work, number: _index(work, _fill_task(work, number)[0], f"{_fill_task(work, number)[1]:06d}"),
        _fill,
    ),
    Stage(
        "merge",
        "merging the index",
        lambda work: len(work.approximate()),
        lambda work, number: _index(work, work.approximate()[number], "merged"),
        _merge,
    ),
    Stage("search", "searching neighbours", _input_shards, _in("neighbors"), _search),
    Stage("recall", "measuring recall", _one, _in("neighbors", "recall.json"), _recall),
    Stage("threshold", "near-duplicates: threshold", _one, _in("duplicates", "histogram.json"), _threshold),
    Stage("duplicates", "near-duplicates", _input_shards, _in("duplicates"), _duplicates),
    Stage("path", "the path", _one, _in("path", "path.npy"), _path),
    Stage("lay", "laying out contexts", _one, lambda work, _: work.partial / "work" / "parts.json", _lay),
    Stage(
        "contexts",
        "writing contexts",
        lambda work: num_parts(work.partial),
        lambda work, number: work.partial / "work" / "books" / f"{number:06d}.json",
        _make_part,
    ),
    Stage("finish", "the manifest", _one, lambda work, _: Path(work.order.directory) / MANIFEST_FILE, _finish),
)
"""In order; the name of each is what `--stage` takes."""
