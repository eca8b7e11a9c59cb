"""What a task of each stage of `longring order` does: what it reads, what it calls, and what it writes."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import write_whole
from ..format.document import SPLITS, Split
from ..format.manifest import open_prepared
from . import duplicates, embed, neighbors, path
from .documents import Documents, load, save, write_tables
from .finish import finish, lay, make_part
from .work import Work

Tell = Callable[[float], None]
"""Called with how much is done: of a task a part in [0, 1]."""


def find_documents(work: Work, number: int, _: Tell) -> None:
    """Write where the documents of an input shard lie."""
    write_tables(open_prepared(work.data.directory, check_shards=False), work.folder("documents"), number)


def list_splits(work: Work, number: int, _: Tell) -> None:
    """Write the numbers of one split's documents, shard by shard, so that no later task reads every table for them."""
    split, documents = SPLITS[number], work.documents()

    def write(file: Path) -> None:
        shape = (documents.manifest.ledger.splits[split].documents,)
        numbers = np.lib.format.open_memmap(file, "w+", np.uint32, shape)
        end = 0
        for shard in range(documents.num_shards):
            here = np.flatnonzero(documents.shard_column(shard, "held_out") == (split == "held_out"))
            numbers[end : end + len(here)] = here + documents.first[shard]
            end += len(here)
        assert end == len(numbers), "the tables hold as many documents as the ledger"
        numbers.flush()

    write_whole(work.split_file(split), write)


def fit_encoder(work: Work, _number: int, _: Tell) -> None:
    """Fit the default encoder on train documents."""
    fit = partial(embed.fit, work.documents(), work.split_numbers("train"), work.order)
    write_whole(work.folder("embed") / "encoder.npz", fit)


def embed_shard(work: Work, number: int, tell: Tell) -> None:
    """Write the vectors of an input shard's documents."""
    documents = work.documents()
    encoder = embed.make_encoder(work.order, work.folder("embed") / "encoder.npz", number)
    vectors, mine = [], documents.of_shard(number)
    for some in encoder.encode(documents, mine):
        # Half precision is enough for a cosine to three digits, and halves what the search reads.
        vectors.append(some.astype(np.float16))
        tell(sum(map(len, vectors)) / len(mine))
    found = np.concatenate(vectors) if vectors else np.empty((0, work.order.embedding_dimensions), dtype=np.float16)
    save(work.folder("embed") / f"{number:06d}.npy", found)


def train_index(work: Work, number: int, _: Tell) -> None:
    """Train the index of a split that is searched approximately."""
    split = work.approximate()[number]
    train = partial(neighbors.train_index, work.embeddings(), work.split_numbers(split))
    write_whole(work.index(split, "trained"), train)


def fill_task(work: Work, number: int) -> tuple[Split, int]:
    """Return of which split a task of stage fill takes which input shard."""
    split, shard = divmod(number, work.num_shards)
    return work.approximate()[split], shard


def fill_index(work: Work, number: int, _: Tell) -> None:
    """Fill a copy of the index with an input shard's documents."""
    split, shard = fill_task(work, number)
    numbers = np.array(work.documents().of_shard(shard), dtype=np.int64)
    numbers = numbers[work.documents().shard_column(shard, "held_out") == (split == "held_out")]
    trained, vectors = work.index(split, "trained"), work.embeddings()[numbers]
    write_whole(work.index(split, f"{shard:06d}"), partial(neighbors.fill_index, trained, vectors, numbers))


def merge_index(work: Work, number: int, _: Tell) -> None:
    """Merge the copies on disk."""
    split = work.approximate()[number]
    parts = [work.index(split, f"{shard:06d}") for shard in range(work.num_shards)]
    merged = work.index(split, "merged")
    write_whole(
        merged, partial(neighbors.merge_index, work.index(split, "trained"), parts, merged.with_suffix(".lists"))
    )


def search_shard(work: Work, number: int, tell: Tell) -> None:
    """Write the neighbours of an input shard's documents."""
    documents, embeddings, count = work.documents(), work.embeddings(), work.order.neighbors
    numbers = np.array(documents.of_shard(number), dtype=np.int64)
    found = np.empty(len(numbers), dtype=[("ids", "<u4", (count,)), ("cosines", "<f4", (count,))])
    held_out = documents.shard_column(number, "held_out")
    done = 0
    for split in SPLITS:
        [here] = np.nonzero(held_out == (split == "held_out"))
        if not len(here):
            continue
        exact = split not in work.approximate()
        if exact:
            index = neighbors.exact_index(embeddings, work.split_numbers(split).astype(np.int64))
        else:
            index = neighbors.merged_index(work.index(split, "merged"))
        for block in np.array_split(here, -(-len(here) // neighbors.BLOCK)):
            some = neighbors.nearest(index, embeddings, numbers[block], count, exact=exact)
            found["ids"][block], found["cosines"][block] = some
            done += len(block)
            tell(done / len(numbers))
    save(work.folder("neighbors") / f"{number:06d}.npy", found)


def measure_recall(work: Work, _: int, tell: Tell) -> None:
    """Write which part of the exact neighbours of some documents was found."""
    documents = work.documents()

    def found_of(document: int) -> NDArray[np.uint32]:
        shard, inside = documents.place(document)
        return work.neighbor_list(shard)[1][inside]

    measured = {}
    for number, split in enumerate(SPLITS):
        numbers = work.split_numbers(split)
        told = partial(_part_of, tell, number, len(SPLITS))
        measured[split] = neighbors.recall(work.embeddings(), numbers, found_of, work.order.neighbors, tell=told)
    _save_json(work.folder("neighbors") / "recall.json", {"recall": measured, "approximate": work.approximate()})


def _part_of(tell: Tell, number: int, count: int, part: float) -> None:
    tell((number + part) / count)


def choose_threshold(work: Work, _: int, tell: Tell) -> None:
    """Write the histogram of cosines, and from which one on pairs are compared."""
    order, documents = work.order, work.documents()
    histogram = duplicates.histogram(_told(work, tell), _inside(documents), order.duplicate_overlap)
    chosen = order.duplicate_similarity or histogram.threshold()
    _save_json(
        work.folder("duplicates") / "histogram.json",
        {
            "threshold": chosen if order.duplicate_overlap else 1.01,
            "cosine_from": duplicates.bin_edges(),
            **{name: counts.tolist() for name, counts in histogram._asdict().items()},
        },
    )


def _told(work: Work, tell: Tell) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]]]:
    """Yield `work.lists()`, telling how far it is."""
    for number, found in enumerate(work.lists(), start=1):
        yield found
        tell(number / work.documents().num_shards)


def confirm_duplicates(work: Work, number: int, _: Tell) -> None:
    """Write the near-duplicates of an input shard's documents."""
    folder = work.folder("duplicates")
    threshold = json.loads((folder / "histogram.json").read_text())["threshold"]
    lists, tokens = work.neighbor_list(number), _inside(work.documents())
    save(
        folder / f"{number:06d}.npy",
        duplicates.confirmed_pairs(*lists, tokens, threshold, work.order.duplicate_overlap),
    )


def _inside(documents: Documents) -> duplicates.Tokens:
    return lambda number: documents.tokens(number)[1:-1]


def walk_path(work: Work, _: int, tell: Tell) -> None:
    """Write the order of all documents. By path, what is done is kept every some seconds, and gone on from."""
    count, order = len(work.documents()), work.order
    dropped = np.zeros(count, dtype=np.bool_)
    dropped[work.left_out()[:, 0]] = True
    steps = np.empty(count - int(np.count_nonzero(dropped)), dtype=path.STEP_DTYPE)
    file = work.folder("path") / "path.steps"
    if order.by == "random":
        steps["document"] = path.random_order(count, dropped, order.seed)
    else:
        ids = np.empty((count, order.neighbors), dtype=np.uint32)
        cosines = np.empty(ids.shape, dtype=np.float32)
        for documents, some_ids, some_cosines in work.lists():
            ids[documents], cosines[documents] = some_ids, some_cosines
        path.leave_out(ids, dropped)
        if order.by == "knn":
            steps["document"] = path.nearest_groups(ids, dropped, order.seed)
        else:
            for done in path.greedy_path(path.make_graph(ids, cosines), dropped, file):
                tell(done / len(steps))
            steps = np.fromfile(file, dtype=path.STEP_DTYPE)
    if order.by != "path":
        # The baselines' steps are none of the graph's: their cosines come from the vectors.
        vectors = work.embeddings()
        steps["similarity"][:1] = np.nan
        for start in range(1, len(steps), 1 << 16):
            some = steps["document"][start - 1 : start + (1 << 16)].astype(np.int64)
            here = vectors[some]
            steps["similarity"][start : start + len(some) - 1] = np.einsum("nd,nd->n", here[1:], here[:-1])
            tell(start / len(steps))
    save(work.folder("path") / "path.npy", steps)
    file.unlink(missing_ok=True)


def lay_contexts(work: Work, _number: int, _: Tell) -> None:
    """Write which pairs of which document lie in which sequence."""
    steps = load(work.folder("path") / "path.npy", mapped=True)
    lay(work.data, work.order, work.documents(), steps["document"], work.partial)


def write_part(work: Work, number: int, tell: Tell) -> None:
    """Write the shards of a part."""
    make_part(work.data, work.order, work.documents(), work.partial, number, tell)


def write_manifest(work: Work, _: int, tell: Tell) -> None:
    """Write the manifest and give the directory its name."""
    finish(
        work.data,
        work.order,
        work.documents(),
        work.embeddings(),
        partial=work.partial,
        left_out=work.left_out(),
        path=load(work.folder("path") / "path.npy", mapped=True),
        lists=_told(work, tell),
        measured={
            **json.loads((work.folder("neighbors") / "recall.json").read_text()),
            "duplicates": json.loads((work.folder("duplicates") / "histogram.json").read_text()),
        },
    )


def _save_json(file: Path, content: Any) -> None:
    write_whole(file, lambda begun: begun.write_text(json.dumps(content) + "\n"))
