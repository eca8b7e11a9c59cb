"""Each document's nearest others by cosine, with faiss: exact for small corpora, else IVF-PQ on disk.

IVF-PQ has the settings of In-Context Pretraining (arXiv 2310.10638, section 2.1), scaled to the corpus. It is trained
on a sample, filled input shard by input shard, merged on disk and searched input shard by input shard, on GPUs where
faiss sees any. The cosines of what it finds are then computed from the vectors themselves: they are the same from
either side, and a threshold on them means what it says.
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
"""Lists looked through for a query, as the paper's."""

SAMPLES_PER_LIST = 48
"""Vectors that an index is trained on, for each list: the paper's 1,572,864 for 32,768."""

DIMENSIONS_PER_CODE = 3
"""One byte for so many dimensions: the paper's 256 bytes for 768."""

GPU_CODE_BYTES = frozenset((1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96))
"""Sizes of PQ codes that faiss' own GPU kernels search. An index of others, as the paper's 256, stays on the CPU."""

OVERSAMPLED = 2
"""IVF-PQ is asked for so many times the neighbours; the nearest by their exact cosines stay."""

RECALL_QUERIES = 512
"""Documents, evenly spaced, for which the search is compared with the exact one."""

BLOCK = 4_096
"""Queries searched at once."""


class Embeddings:
    """All documents' vectors, in one file for each input shard, read where they are asked for."""

    def __init__(self, folder: Path, first: NDArray[np.int64]):
        self._first = first
        self._folder = folder
        self._block = lru_cache(maxsize=MAX_OPEN_SHARDS)(self._open)
        self.dimensions = self._block(int(np.argmax(np.diff(first)))).shape[1]

    def __getitem__(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the vectors of documents `numbers` [n]: [n, dimensions]."""
        found = np.empty((len(numbers), self.dimensions), dtype=np.float32)
        shards = np.searchsorted(self._first, numbers, side="right") - 1
        # Sorted, not looked for shard by shard: of 10^4 shards a block of neighbours has some of each.
        order = np.argsort(shards, kind="stable")
        for here in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1) if len(order) else ():
            shard = int(shards[here[0]])
            found[here] = self._block(shard)[numbers[here] - self._first[shard]]
        return found

    def _open(self, number: int) -> NDArray[np.float16]:
        return load(self._folder / f"{number:06d}.npy", mapped=True)


@lru_cache(maxsize=1)
def opened(folder: Path, first: tuple[int, ...]) -> Embeddings:
    """Return the vectors, opened once a process."""
    return Embeddings(folder, np.array(first))


def num_lists(num_documents: int) -> int:
    """Return the lists of an IVF index: a power of two near 2.14 sqrt(n), which at the paper's 235M is its 32,768."""
    return 1 << max(0, round(np.log2(2.14 * num_documents**0.5)))


def code_bytes(dimensions: int) -> int:
    """Return the bytes of a PQ code: the most that divide the dimensions, at least three of which go into one."""
    most = max(1, dimensions // DIMENSIONS_PER_CODE)
    return next(size for size in range(most, 0, -1) if dimensions % size == 0)


def train_index(embeddings: Embeddings, numbers: NDArray[np.integer], file: Path) -> None:
    """Write an empty IVF-PQ index for documents `numbers`, trained on a sample of them."""
    lists, dimensions = num_lists(len(numbers)), embeddings.dimensions
    # The clustering asks for at least 39 vectors for each of a code's 256 values.
    size = min(len(numbers), max(SAMPLES_PER_LIST * lists, 39 * 256))
    sample = embeddings[numbers[np.linspace(0, len(numbers) - 1, size).astype(np.int64)].astype(np.int64)]
    index = faiss.IndexIVFPQ(
        faiss.IndexFlatIP(dimensions), dimensions, lists, code_bytes(dimensions), 8, faiss.METRIC_INNER_PRODUCT
    )
    index.cp.min_points_per_centroid = 1  # a warning less: the sample is what there is
    index.pq.cp.min_points_per_centroid = 1
    if faiss.get_num_gpus():
        # The lists' centres are what takes long, and codes of any size can be trained on the CPU.
        clustering: Any = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(dimensions))
        index.clustering_index = clustering
    index.train(sample)
    faiss.write_index(index, str(file))


def fill_index(trained: Path, vectors: NDArray[np.float32], numbers: NDArray[np.int64], file: Path) -> None:
    """Write the trained index with one input shard's vectors."""
    index = _read(trained)
    index.add_with_ids(vectors, numbers)
    faiss.write_index(index, str(file))


def merge_index(trained: Path, parts: list[Path], lists: Path, file: Path) -> None:
    """Write the parts as one index that stays on disk: `file`, and its `lists`, which it names."""
    index = _read(trained)
    merge_ondisk(index, [str(part) for part in parts], str(lists))
    sync(lists)
    faiss.write_index(index, str(file))


@lru_cache(maxsize=2)
def merged_index(file: Path) -> Any:
    """Return the merged index, opened once a process; on the GPUs where there are any."""
    index = _read(file)  # its lists stay on disk, mapped
    index.nprobe = min(PROBES, index.nlist)
    if not (faiss.get_num_gpus() and index.code_size in GPU_CODE_BYTES):
        return index
    options: Any = faiss.GpuMultipleClonerOptions()
    options.useFloat16 = True  # tables of codes from 56 bytes on do not fit into shared memory otherwise
    return faiss.index_cpu_to_all_gpus(index, co=options)


def _read(file: Path) -> Any:
    try:
        return faiss.read_index(str(file))
    except RuntimeError as error:
        raise damaged(file, error) from error


def exact_index(embeddings: Embeddings, numbers: NDArray[np.int64]) -> Any:
    """Return an index that compares with every one of documents `numbers`."""
    index = faiss.IndexIDMap(faiss.IndexFlatIP(embeddings.dimensions))
    index.add_with_ids(embeddings[numbers], numbers)
    return index


def nearest(
    index: Any, embeddings: Embeddings, numbers: NDArray[np.int64], count: int, *, exact: bool
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Return the nearest others of documents `numbers` [n] and their cosines: [n, count], best first.

    Equals are ordered by number. Where fewer are found, NO_NEIGHBOR and -inf fill up.
    """
    asked = (count + 1) * (1 if exact else OVERSAMPLED)
    ids = np.full((len(numbers), count), NO_NEIGHBOR, dtype=np.uint32)
    cosines = np.full((len(numbers), count), -np.inf, dtype=np.float32)
    for start in range(0, len(numbers), BLOCK):
        own = numbers[start : start + BLOCK]
        queries = embeddings[own]
        _, found = index.search(queries, asked)
        # By its number: where several have one vector, or codes lose something, a document is not its own nearest.
        found[found == own[:, None]] = -1
        others = embeddings[np.maximum(found, 0).ravel()].reshape(*found.shape, -1)
        similarity = np.einsum("nd,nkd->nk", queries, others)
        similarity[found < 0] = -np.inf
        best = np.lexsort((found, -similarity), axis=-1)[:, :count]
        found, similarity = (np.take_along_axis(table, best, axis=1) for table in (found, similarity))
        ids[start : start + BLOCK, : found.shape[1]] = np.where(found < 0, NO_NEIGHBOR, found)
        cosines[start : start + BLOCK, : found.shape[1]] = similarity
    return ids, cosines


def recall(
    embeddings: Embeddings,
    numbers: NDArray[np.integer],
    found_of: Callable[[int], NDArray[np.uint32]],
    count: int,
    *,
    block: int = 1 << 16,
    tell: Callable[[float], None] = lambda _: None,
) -> float:
    """Return the part of the exact nearest of some of documents `numbers` that `found_of(document)` has.

    1 where there are no documents. `tell` learns which part of them has been compared.
    """
    if not len(numbers):
        return 1.0
    sample = numbers[np.unique(np.linspace(0, len(numbers) - 1, RECALL_QUERIES).astype(np.int64))].astype(np.int64)
    queries = embeddings[sample]
    best = np.full((len(sample), count), -np.inf, dtype=np.float32)
    ids = np.full((len(sample), count), -1, dtype=np.int64)
    for start in range(0, len(numbers), block):
        some = numbers[start : start + block].astype(np.int64)
        asked = min(count + 1, len(some))
        similarity, places = faiss.knn(queries, embeddings[some], asked, metric=faiss.METRIC_INNER_PRODUCT)
        names = some[places]
        similarity[names == sample[:, None]] = -np.inf
        together, names = np.concatenate([best, similarity], axis=1), np.concatenate([ids, names], axis=1)
        chosen = np.argsort(-together, axis=1, kind="stable")[:, :count]
        best, ids = np.take_along_axis(together, chosen, axis=1), np.take_along_axis(names, chosen, axis=1)
        tell(min(1, (start + block) / len(numbers)))
    ids[np.isneginf(best)] = -1
    hits = sum(
        len(set(exact[exact >= 0]) & set(found_of(int(query)).tolist()))
        for query, exact in zip(sample, ids, strict=True)
    )
    return hits / max(np.count_nonzero(ids >= 0), 1)
