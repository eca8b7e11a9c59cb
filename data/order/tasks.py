"""The tasks of the stages of `longring order`: each reads files of earlier stages and writes one file."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import write_text, write_whole
from ..format.document import SPLITS, Split
from ..format.manifest import open_prepared
from . import duplicates, embed, neighbors, path
from .documents import Documents, load, save, write_tables
from .finish import finish, lay, make_part
from .work_directory import WorkDirectory

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
    """Write the trained, empty index of a split that is searched approximately."""
    split = directory.approximate()[number]
    train = partial(neighbors.train_index, directory.embeddings(), directory.split_numbers(split))
    write_whole(directory.index(split, "trained"), train)


def fill_task(directory: WorkDirectory, number: int) -> tuple[Split, int]:
    """Return the split and the input shard of a task of stage fill."""
    split, shard = divmod(number, directory.num_shards)
    return directory.approximate()[split], shard


def fill_index(directory: WorkDirectory, number: int, _: OnProgress) -> None:
    """Write a copy of the trained index with one input shard's documents of one split."""
    split, shard = fill_task(directory, number)
    numbers = np.array(directory.documents().of_shard(shard), dtype=np.int64)
    numbers = numbers[directory.documents().shard_column(shard, "held_out") == (split == "held_out")]
    trained, vectors = directory.index(split, "trained"), directory.embeddings()[numbers]
    write_whole(directory.index(split, f"{shard:06d}"), partial(neighbors.fill_index, trained, vectors, numbers))


def merge_index(directory: WorkDirectory, number: int, _: OnProgress) -> None:
    """Merge the filled copies of a split's index on disk."""
    split = directory.approximate()[number]
    parts = [directory.index(split, f"{shard:06d}") for shard in range(directory.num_shards)]
    trained, merged = directory.index(split, "trained"), directory.index(split, "merged")
    write_whole(merged, partial(neighbors.merge_index, trained, parts, merged.with_suffix(".lists")))


def search_shard(directory: WorkDirectory, number: int, on_progress: OnProgress) -> None:
    """Write the neighbours of an input shard's documents, each searched within its own split."""
    documents, embeddings, count = directory.documents(), directory.embeddings(), directory.order.neighbors
    numbers = np.array(documents.of_shard(number), dtype=np.int64)
    found = np.empty(len(numbers), dtype=[("ids", "<u4", (count,)), ("cosines", "<f4", (count,))])
    held_out = documents.shard_column(number, "held_out")
    done = 0
    for split in SPLITS:
        [here] = np.nonzero(held_out == (split == "held_out"))  # a document has neighbours of its own split only
        if not len(here):
            continue
        exact = split not in directory.approximate()
        if exact:
            index = neighbors.exact_index(embeddings, directory.split_numbers(split).astype(np.int64))
        else:
            index = neighbors.merged_index(directory.index(split, "merged"))
        for some in np.array_split(here, -(-len(here) // neighbors.QUERIES_AT_ONCE)):
            nearest = neighbors.nearest(index, embeddings, numbers[some], count, exact=exact)
            found["ids"][some], found["cosines"][some] = nearest  # [documents, k] each
            done += len(some)
            on_progress(done / len(numbers))
    save(directory.folder("neighbors") / f"{number:06d}.npy", found)


def measure_recall(directory: WorkDirectory, _: int, on_progress: OnProgress) -> None:
    """Write the recall of the search: the fraction of the exact neighbours of sampled documents that it found."""
    documents = directory.documents()

    def found_of(document: int) -> NDArray[np.uint32]:
        shard, index = documents.locate(document)
        return directory.neighbor_list(shard)[1][index]

    recalls = {}
    for number, split in enumerate(SPLITS):
        recalls[split] = neighbors.recall(
            directory.embeddings(),
            directory.split_numbers(split),
            found_of,
            directory.order.neighbors,
            on_progress=lambda part, number=number: on_progress((number + part) / len(SPLITS)),
        )
    measured = {"recall": recalls, "approximate": directory.approximate()}
    _save_json(directory.folder("neighbors") / "recall.json", measured)


def choose_threshold(directory: WorkDirectory, _: int, on_progress: OnProgress) -> None:
    """Write the histogram of neighbours' cosines, and the cosine from which pairs are compared."""
    order, documents = directory.order, directory.documents()
    histogram = duplicates.histogram(
        _neighbor_lists(directory, on_progress), _text_of(documents), order.duplicate_overlap
    )
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
    directory: WorkDirectory, on_progress: OnProgress
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]]]:
    """Yield `directory.neighbor_lists()` and report the progress after each."""
    for number, found in enumerate(directory.neighbor_lists(), start=1):
        yield found
        on_progress(number / directory.documents().num_shards)


def confirm_duplicates(directory: WorkDirectory, number: int, _: OnProgress) -> None:
    """Write the near-duplicate pairs of an input shard's documents."""
    folder = directory.folder("duplicates")
    threshold = json.loads((folder / "histogram.json").read_text())["threshold"]
    pairs = duplicates.confirmed_pairs(
        *directory.neighbor_list(number),
        _text_of(directory.documents()),
        threshold,
        directory.order.duplicate_overlap,
    )
    save(folder / f"{number:06d}.npy", pairs)


def _text_of(documents: Documents) -> duplicates.Tokens:
    """Return the function from a document to its tokens without the boundaries at its ends."""
    return lambda number: documents.tokens(number)[1:-1]


def walk_path(directory: WorkDirectory, _: int, on_progress: OnProgress) -> None:
    """Write the path: all documents but the dropped near-duplicates, in order.

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
        steps = np.fromfile(unfinished, dtype=path.STEP_DTYPE)
    else:
        steps = np.empty(num_steps, dtype=path.STEP_DTYPE)
        if order.by == "knn":
            ids, _cosines = _kept_neighbors(directory, dropped)
            steps["document"] = path.nearest_groups(ids, dropped, order.seed)
        else:
            steps["document"] = path.random_order(len(dropped), dropped, order.seed)
        _fill_similarities(steps, directory.embeddings(), on_progress)
    save(directory.folder("path") / "path.npy", steps)
    unfinished.unlink(missing_ok=True)


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
