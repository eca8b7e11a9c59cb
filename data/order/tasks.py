"""The tasks of the stages of `longring order`: each reads files of earlier stages and writes one file."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import write_text, write_whole
from ..format.document import SPLITS
from ..format.manifest import open_prepared
from . import duplicates, embed, neighbors, path
from .documents import Documents, load, save, write_tables
from .finish import finish, lay, make_part
from .work_directory import Group, WorkDirectory

OnProgress = Callable[[float], None]
"""A function that a task calls with the fraction that is done, in [0, 1]."""

STEPS_AT_ONCE = 1 << 16
"""Number of steps of a baseline whose cosines are computed at once."""


def find_documents(directory: WorkDirectory, number: int, _: OnProgress) -> None:
    """Write the tables of an input shard's documents and of their parts."""
    write_tables(open_prepared(directory.data.directory, check_shards=False), directory.folder("documents"), number)


def list_splits(directory: WorkDirectory, number: int, _: OnProgress) -> None:
    """Write the list of one split's documents, so that later tasks need not read the table of every input shard."""
    split, documents = SPLITS[number], directory.documents()

    def write(file: Path) -> None:
        shape = (documents.manifest.ledger.splits[split].documents,)
        numbers = np.lib.format.open_memmap(file, "w+", np.uint32, shape)
        end = 0  # invariant: numbers[:end] are the documents of the input shards before `shard`
        for shard in range(documents.num_shards):
            here = np.flatnonzero(documents.shard_column(shard, "held_out") == (split == "held_out"))
            numbers[end : end + len(here)] = here + documents.first[shard]
            end += len(here)
        assert end == len(numbers), "the tables have as many documents as the ledger"
        numbers.flush()

    write_whole(directory.split_file(split), write)


def fit_encoder(directory: WorkDirectory, _number: int, _: OnProgress) -> None:
    """Fit the default encoder on train documents and write it."""
    fit = partial(embed.fit, directory.documents(), directory.split_numbers("train"), directory.order)
    write_whole(directory.folder("embed") / "encoder.npz", fit)


def embed_shard(directory: WorkDirectory, number: int, on_progress: OnProgress) -> None:
    """Write the vectors of an input shard's documents."""
    documents = directory.documents()
    encoder = embed.make_encoder(directory.order, directory.folder("embed") / "encoder.npz", number)
    vectors, mine = [], documents.of_shard(number)
    for batch in encoder.encode(documents, mine):  # [documents of the batch, dimensions]
        # Half precision gives a cosine to three digits, and the search reads half as many bytes.
        vectors.append(batch.astype(np.float16))
        on_progress(sum(map(len, vectors)) / len(mine))
    found = (
        np.concatenate(vectors) if vectors else np.empty((0, directory.order.embedding_dimensions), dtype=np.float16)
    )
    save(directory.folder("embed") / f"{number:06d}.npy", found)


def train_index(directory: WorkDirectory, number: int, _: OnProgress) -> None:
    """Write the trained, empty index of a group that is searched approximately."""
    group = directory.approximate()[number]
    train = partial(neighbors.train_index, directory.embeddings(), directory.group_numbers(group))
    write_whole(directory.index(group, "trained"), train)


def fill_tasks(directory: WorkDirectory) -> list[tuple[Group, int]]:
    """Return the group and the input shard of each task of stage fill."""
    documents = directory.documents()

    def shards(source: int | None) -> range:
        return range(documents.num_shards) if source is None else documents.shards_of(source)

    return [(group, shard) for group in directory.approximate() for shard in shards(group.source)]


def fill_index(directory: WorkDirectory, number: int, _: OnProgress) -> None:
    """Write a copy of the trained index with one input shard's documents of one group."""
    group, shard = fill_tasks(directory)[number]
    numbers = np.array(directory.documents().of_shard(shard), dtype=np.int64)
    numbers = numbers[directory.documents().shard_column(shard, "held_out") == (group.split == "held_out")]
    trained, vectors = directory.index(group, "trained"), directory.embeddings()[numbers]
    write_whole(directory.index(group, f"{shard:06d}"), partial(neighbors.fill_index, trained, vectors, numbers))


def merge_index(directory: WorkDirectory, number: int, _: OnProgress) -> None:
    """Merge the filled copies of a group's index on disk."""
    group = directory.approximate()[number]
    parts = [directory.index(group, f"{shard:06d}") for one, shard in fill_tasks(directory) if one == group]
    trained, merged = directory.index(group, "trained"), directory.index(group, "merged")
    write_whole(merged, partial(neighbors.merge_index, trained, parts, merged.with_suffix(".lists")))


def search_shard(directory: WorkDirectory, number: int, on_progress: OnProgress) -> None:
    """Write the neighbours of an input shard's documents, each searched within its split and every scope."""
    scopes = directory.scopes(directory.documents().source_of_shard(number))
    for index, (prefix, source) in enumerate(scopes.items()):
        found = _nearest(directory, number, source, lambda part, i=index: on_progress((i + part) / len(scopes)))
        save(directory.folder("neighbors") / f"{prefix}{number:06d}.npy", found)


def _nearest(directory: WorkDirectory, number: int, source: int | None, on_progress: OnProgress) -> NDArray[np.void]:
    """Return the neighbours, in one source or in all, of an input shard's documents: (ids, cosines) [documents]."""
    documents, embeddings, count = directory.documents(), directory.embeddings(), directory.order.neighbors
    numbers = np.array(documents.of_shard(number), dtype=np.int64)
    found = np.empty(len(numbers), dtype=[("ids", "<u4", (count,)), ("cosines", "<f4", (count,))])
    held_out = documents.shard_column(number, "held_out")
    done = 0
    for split in SPLITS:
        [here] = np.nonzero(held_out == (split == "held_out"))  # a document has neighbours of its own split only
        if not len(here):
            continue
        group = Group(source, split)
        exact = group not in directory.approximate()
        if exact:
            index = neighbors.exact_index(embeddings, directory.group_numbers(group).astype(np.int64))
        else:
            index = neighbors.merged_index(directory.index(group, "merged"))
        for some in np.array_split(here, -(-len(here) // neighbors.QUERIES_AT_ONCE)):
            nearest = neighbors.nearest(index, embeddings, numbers[some], count, exact=exact)
            found["ids"][some], found["cosines"][some] = nearest  # [documents, k] each
            done += len(some)
            on_progress(done / len(numbers))
    return found


def measure_recall(directory: WorkDirectory, _: int, on_progress: OnProgress) -> None:
    """Write the recall of the search: the fraction of the exact neighbours of sampled documents that it found.

    The same number of documents is sampled in each source.
    """
    documents = directory.documents()

    def found_of(document: int) -> NDArray[np.uint32]:
        shard, index = documents.locate(document)
        return directory.neighbor_list(shard)[1][index]

    groups = [Group(source, split) for split in SPLITS for source in range(len(documents.manifest.sources))]
    counts = dict.fromkeys(SPLITS, np.zeros(2, dtype=np.int64))  # (found, exact neighbours)
    for number, group in enumerate(groups):
        counts[group.split] = counts[group.split] + neighbors.recall(
            directory.embeddings(),
            directory.group_numbers(group),
            found_of,
            directory.order.neighbors,
            on_progress=lambda part, number=number: on_progress((number + part) / len(groups)),
        )
    # A split without documents has nothing to find.
    recalls = {split: found / exact if exact else 1.0 for split, (found, exact) in counts.items()}
    searched = {group.split for group in directory.approximate()}
    measured = {"recall": recalls, "approximate": [split for split in SPLITS if split in searched]}
    _save_json(directory.folder("neighbors") / "recall.json", measured)


def choose_threshold(directory: WorkDirectory, _: int, on_progress: OnProgress) -> None:
    """Write the histogram of neighbours' cosines, and the cosine from which pairs are compared."""
    order, documents = directory.order, directory.documents()
    lists = _neighbor_lists(directory, on_progress, all_sources=True)
    histogram = duplicates.histogram(lists, _text_of(documents), order.duplicate_overlap)
    chosen = order.duplicate_similarity or histogram.threshold()
    _save_json(
        directory.folder("duplicates") / "histogram.json",
        {
            "threshold": chosen if order.duplicate_overlap else duplicates.NO_COSINE,
            "cosine_from": duplicates.bin_edges(),
            **{name: counts.tolist() for name, counts in histogram._asdict().items()},
        },
    )


def _neighbor_lists(
    directory: WorkDirectory, on_progress: OnProgress, *, all_sources: bool = False
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]]]:
    """Yield `directory.neighbor_lists()` and report the progress after each."""
    for number, found in enumerate(directory.neighbor_lists(all_sources=all_sources), start=1):
        yield found
        on_progress(number / directory.documents().num_shards)


def confirm_duplicates(directory: WorkDirectory, number: int, _: OnProgress) -> None:
    """Write the near-duplicate pairs of an input shard's documents."""
    folder = directory.folder("duplicates")
    threshold = json.loads((folder / "histogram.json").read_text())["threshold"]
    pairs = duplicates.confirmed_pairs(
        *directory.neighbor_list(number, all_sources=True),
        _text_of(directory.documents()),
        threshold,
        directory.order.duplicate_overlap,
    )
    save(folder / f"{number:06d}.npy", pairs)


def _text_of(documents: Documents) -> duplicates.Tokens:
    """Return the function from a document to its tokens without the boundaries at its ends."""
    return lambda number: documents.tokens(number)[1:-1]


def walk_path(directory: WorkDirectory, _: int, on_progress: OnProgress) -> None:
    """Write the path: all documents but the dropped near-duplicates, in order, source by source.

    The graph has no edge between two sources, so the part of each is the path that the walk takes through it alone.
    With order.by = "path" the walk is saved every few seconds, and a task that was killed resumes it.
    """
    order = directory.order
    dropped = np.zeros(len(directory.documents()), dtype=np.bool_)
    dropped[directory.dropped()[:, 0]] = True  # [documents]
    num_steps = len(dropped) - int(np.count_nonzero(dropped))
    unfinished = directory.folder("path") / "path.steps"
    if order.by == "path":
        graph = path.make_graph(*_kept_neighbors(directory, dropped))
        for done in path.greedy_path(graph, dropped, unfinished):
            on_progress(done / num_steps)
        # The walk has no state but this file, so the finished path is its content.
        steps = _by_source(directory.documents(), np.fromfile(unfinished, dtype=path.STEP_DTYPE))
    else:
        steps = np.empty(num_steps, dtype=path.STEP_DTYPE)
        if order.by == "knn":
            ids, _cosines = _kept_neighbors(directory, dropped)
            steps["document"] = path.nearest_groups(ids, dropped, order.seed)
        else:
            steps["document"] = path.random_order(len(dropped), dropped, order.seed)
        steps = _by_source(directory.documents(), steps)
        _fill_similarities(steps, directory.embeddings(), on_progress)
        sources = directory.documents().sources_of(steps["document"])
        steps["similarity"][1:][np.diff(sources) > 0] = np.nan  # the path of another source begins
    save(directory.folder("path") / "path.npy", steps)
    unfinished.unlink(missing_ok=True)


def _by_source(documents: Documents, steps: NDArray[np.void]) -> NDArray[np.void]:
    """Return steps [n] source by source, in the same order within each."""
    if len(documents.manifest.sources) == 1:  # 10^9 steps need not be moved
        return steps
    return steps[np.argsort(documents.sources_of(steps["document"]), kind="stable")]


def _kept_neighbors(
    directory: WorkDirectory, dropped: NDArray[np.bool_]
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Return the neighbours of all documents without the dropped ones, and their cosines, [documents, k] each."""
    ids = np.empty((len(dropped), directory.order.neighbors), dtype=np.uint32)
    cosines = np.empty(ids.shape, dtype=np.float32)
    # The documents of the input shards, in order, are all documents.
    for documents, some_ids, some_cosines in directory.neighbor_lists():
        ids[documents], cosines[documents] = some_ids, some_cosines
    path.remove_dropped(ids, dropped)
    return ids, cosines


def _fill_similarities(steps: NDArray[np.void], embeddings: neighbors.Embeddings, on_progress: OnProgress) -> None:
    """Set the similarity of each step of a baseline: its steps need not be edges of the graph."""
    steps["similarity"][:1] = np.nan
    for start in range(1, len(steps), STEPS_AT_ONCE):
        # One document more than steps: each step is compared with the document before it.
        documents = steps["document"][start - 1 : start + STEPS_AT_ONCE].astype(np.int64)
        vectors = embeddings[documents]
        steps["similarity"][start : start + len(documents) - 1] = np.einsum("nd,nd->n", vectors[1:], vectors[:-1])
        on_progress(start / len(steps))


def lay_contexts(directory: WorkDirectory, _number: int, _: OnProgress) -> None:
    """Write the layout: the documents and pairs of every sequence."""
    steps = load(directory.folder("path") / "path.npy", mapped=True)
    lay(directory.data, directory.order, directory.documents(), steps["document"], directory.partial)


def write_part(directory: WorkDirectory, number: int, on_progress: OnProgress) -> None:
    """Write the shards of one part of the ordered data."""
    make_part(directory.data, directory.order, directory.documents(), directory.partial, number, on_progress)


def write_manifest(directory: WorkDirectory, _: int, on_progress: OnProgress) -> None:
    """Write the manifest and give the ordered data its name."""
    finish(
        directory.data,
        directory.order,
        directory.documents(),
        directory.embeddings(),
        partial=directory.partial,
        dropped=directory.dropped(),
        path=load(directory.folder("path") / "path.npy", mapped=True),
        lists=_neighbor_lists(directory, on_progress),
        measured={
            **json.loads((directory.folder("neighbors") / "recall.json").read_text()),
            "duplicates": json.loads((directory.folder("duplicates") / "histogram.json").read_text()),
        },
    )


def _save_json(file: Path, content: Any) -> None:
    write_text(file, json.dumps(content) + "\n")
