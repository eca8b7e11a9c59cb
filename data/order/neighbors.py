"""The nearest neighbours of every document by cosine, with faiss: exact for small corpora, else by IVF-PQ on disk.

IVF-PQ has the settings of In-Context Pretraining (arXiv 2310.10638, section 2.1), scaled to the corpus. The index is
trained on a sample, filled input shard by input shard, merged on disk and searched input shard by input shard, on GPUs
where faiss finds any. The cosines of the neighbours are then computed from the vectors themselves, so a pair has the
same cosine from either side.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from faiss.contrib.ondisk import merge_ondisk
from numpy.typing import NDArray

from ..files import sync
from ..format.reader import MAX_OPEN_SHARDS
from .documents import damaged, load
from .path import NO_NEIGHBOR

PROBES = 64
"""Number of lists that a query searches, as in the paper."""

SAMPLES_PER_LIST = 48
"""Number of training vectors for each list: the paper has 1,572,864 for 32,768 lists."""

DIMENSIONS_PER_CODE = 3
"""Number of dimensions for each byte of a code: the paper has 256 bytes for 768 dimensions."""

GPU_CODE_BYTES = frozenset((1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96))
"""Sizes of PQ codes that faiss' own GPU kernels search; an index with other codes (the paper's have 256 bytes) stays on
the CPU."""

OVERSAMPLED = 2
"""Factor by which IVF-PQ returns more neighbours than needed; those with the largest exact cosines are kept."""

RECALL_QUERIES = 512
"""Number of documents, evenly spaced, for which the search is compared with the exact one."""

QUERIES_AT_ONCE = 4_096
"""Number of queries that are searched at once."""


class Embeddings:
    """The vectors of all documents, stored in one mapped file for each input shard.

    `first` is the first document of each input shard, int64 [input shards + 1].
    """

    def __init__(self, folder: Path, first: NDArray[np.int64]):
        self._first = first
        self._folder = folder
        self._shard = lru_cache(maxsize=MAX_OPEN_SHARDS)(self._open)
        self.dimensions = self._shard(int(np.argmax(np.diff(first)))).shape[1]

    def __getitem__(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the vectors of documents `numbers` [n], float32 [n, dimensions]."""
        found = np.empty((len(numbers), self.dimensions), dtype=np.float32)
        shards = np.searchsorted(self._first, numbers, side="right") - 1
        # Sorting by shard takes one pass; the neighbours of some queries may come from each of 10^4 shards.
        order = np.argsort(shards, kind="stable")
        for here in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1) if len(order) else ():
            shard = int(shards[here[0]])
            found[here] = self._shard(shard)[numbers[here] - self._first[shard]]
        return found

    def _open(self, number: int) -> NDArray[np.float16]:
        return load(self._folder / f"{number:06d}.npy", mapped=True)


@lru_cache(maxsize=1)
def opened(folder: Path, first: tuple[int, ...]) -> Embeddings:
    """Return the vectors in `folder`, opened once by a process; `first` is that of `Embeddings`."""
    return Embeddings(folder, np.array(first))


def num_lists(num_documents: int) -> int:
    """Return the number of lists of an IVF index: a power of two near 2.14 sqrt(n), the paper's 32,768 for 235M."""
    return 1 << max(0, round(np.log2(2.14 * num_documents**0.5)))


def code_bytes(dimensions: int) -> int:
    """Return the bytes of a PQ code: the largest divisor of `dimensions` with at least 3 dimensions for each byte."""
    most = max(1, dimensions // DIMENSIONS_PER_CODE)
    return next(size for size in range(most, 0, -1) if dimensions % size == 0)


def train_index(embeddings: Embeddings, numbers: NDArray[np.integer], file: Path) -> None:
    """Write to `file` an empty IVF-PQ index for documents `numbers` [n], trained on a sample of them."""
    lists, dimensions = num_lists(len(numbers)), embeddings.dimensions
    # faiss' clustering wants at least 39 vectors for each of the 256 values of a code's byte.
    size = min(len(numbers), max(SAMPLES_PER_LIST * lists, 39 * 256))
    sample = embeddings[numbers[np.linspace(0, len(numbers) - 1, size).astype(np.int64)].astype(np.int64)]
    index = faiss.IndexIVFPQ(
        faiss.IndexFlatIP(dimensions), dimensions, lists, code_bytes(dimensions), 8, faiss.METRIC_INNER_PRODUCT
    )
    index.cp.min_points_per_centroid = 1  # no warning: a small corpus has no larger sample
    index.pq.cp.min_points_per_centroid = 1
    if faiss.get_num_gpus():
        # Clustering the lists' centres takes long and runs on GPUs; codes of any size are trained on the CPU.
        clustering: Any = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(dimensions))
        index.clustering_index = clustering
    index.train(sample)
    faiss.write_index(index, str(file))


def fill_index(trained: Path, vectors: NDArray[np.float32], numbers: NDArray[np.int64], file: Path) -> None:
    """Write to `file` the `trained` index with one input shard's `vectors` [n, d] of documents `numbers` [n]."""
    index = _read(trained)
    index.add_with_ids(vectors, numbers)
    faiss.write_index(index, str(file))


def merge_index(trained: Path, parts: list[Path], lists: Path, file: Path) -> None:
    """Write the filled `parts` as one index on disk: `file`, which names the file of its `lists`."""
    index = _read(trained)
    merge_ondisk(index, [str(part) for part in parts], str(lists))
    sync(lists)
    faiss.write_index(index, str(file))


@lru_cache(maxsize=2)
def merged_index(file: Path) -> Any:
    """Return the merged index, on the GPUs if there are any; a process opens it once."""
    index = _read(file)  # its lists stay on disk, mapped
    index.nprobe = min(PROBES, index.nlist)
    if not (faiss.get_num_gpus() and index.code_size in GPU_CODE_BYTES):
        return index
    options: Any = faiss.GpuMultipleClonerOptions()
    options.useFloat16 = True  # float32 tables of codes of 56 bytes or more exceed shared memory
    return faiss.index_cpu_to_all_gpus(index, co=options)


def _read(file: Path) -> Any:
    """Return the index in `file`. Raises ValueError if it is damaged."""
    try:
        return faiss.read_index(str(file))
    except RuntimeError as error:
        raise damaged(file, error) from error


def exact_index(embeddings: Embeddings, numbers: NDArray[np.int64]) -> Any:
    """Return an index that compares a query with each of documents `numbers` [n]."""
    index = faiss.IndexIDMap(faiss.IndexFlatIP(embeddings.dimensions))
    index.add_with_ids(embeddings[numbers], numbers)
    return index


def nearest(
    index: Any, embeddings: Embeddings, numbers: NDArray[np.int64], count: int, *, exact: bool
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Return the nearest neighbours of documents `numbers` [n] and their cosines, [n, count] each, nearest first.

    Neighbours with equal cosines are ordered by number. A list with fewer neighbours ends with NO_NEIGHBOR and -inf.
    """
    asked = (count + 1) * (1 if exact else OVERSAMPLED)
    ids = np.full((len(numbers), count), NO_NEIGHBOR, dtype=np.uint32)
    cosines = np.full((len(numbers), count), -np.inf, dtype=np.float32)
    for start in range(0, len(numbers), QUERIES_AT_ONCE):
        own = numbers[start : start + QUERIES_AT_ONCE]
        queries = embeddings[own]  # [queries, dimensions]
        _, found = index.search(queries, asked)
        # A document is excluded by its number: with equal vectors or lossy codes it need not be its own nearest.
        found[found == own[:, None]] = -1
        others = embeddings[np.maximum(found, 0).ravel()].reshape(*found.shape, -1)  # [queries, asked, dimensions]
        similarity = np.einsum("nd,nkd->nk", queries, others)  # [queries, asked]
        similarity[found < 0] = -np.inf
        best = np.lexsort((found, -similarity), axis=-1)[:, :count]
        found, similarity = (np.take_along_axis(table, best, axis=1) for table in (found, similarity))
        ids[start : start + QUERIES_AT_ONCE, : found.shape[1]] = np.where(found < 0, NO_NEIGHBOR, found)
        cosines[start : start + QUERIES_AT_ONCE, : found.shape[1]] = similarity
    return ids, cosines


def recall(
    embeddings: Embeddings,
    numbers: NDArray[np.integer],
    found_of: Callable[[int], NDArray[np.uint32]],
    count: int,
    *,
    at_once: int = 1 << 16,
    on_progress: Callable[[float], None] = lambda _: None,
) -> tuple[int, int]:
    """Return the number of exact nearest neighbours of documents that `found_of(document)` has, and of all of them.

    They are counted for RECALL_QUERIES of documents `numbers` [n], with `count` neighbours each. `at_once` documents
    are compared at a time, and `on_progress` gets the fraction that has been compared.
    """
    if not len(numbers):
        return 0, 0
    sample = numbers[np.unique(np.linspace(0, len(numbers) - 1, RECALL_QUERIES).astype(np.int64))].astype(np.int64)
    queries = embeddings[sample]
    # [queries, count]: the nearest neighbours among the documents compared so far.
    best = np.full((len(sample), count), -np.inf, dtype=np.float32)
    ids = np.full((len(sample), count), -1, dtype=np.int64)
    for start in range(0, len(numbers), at_once):
        some = numbers[start : start + at_once].astype(np.int64)
        asked = min(count + 1, len(some))
        similarity, indices = faiss.knn(queries, embeddings[some], asked, metric=faiss.METRIC_INNER_PRODUCT)
        found = some[indices]  # [queries, asked]
        similarity[found == sample[:, None]] = -np.inf
        # Merge the best of the earlier documents with those of these: [queries, count + asked].
        together, found = np.concatenate([best, similarity], axis=1), np.concatenate([ids, found], axis=1)
        chosen = np.argsort(-together, axis=1, kind="stable")[:, :count]
        best, ids = np.take_along_axis(together, chosen, axis=1), np.take_along_axis(found, chosen, axis=1)
        on_progress(min(1, (start + at_once) / len(numbers)))
    ids[np.isneginf(best)] = -1
    hits = sum(
        len(set(exact[exact >= 0]) & set(found_of(int(query)).tolist()))
        for query, exact in zip(sample, ids, strict=True)
    )
    return hits, int(np.count_nonzero(ids >= 0))
