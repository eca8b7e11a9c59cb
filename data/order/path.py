"""A path through all documents along the most similar ones: a greedy maximum travelling salesman tour.

The algorithm is Algorithm 1 of In-Context Pretraining (arXiv 2310.10638, section 2.2), whose line 7 has argmin as a
misprint for argmax. The graph is undirected: two documents share an edge if either lists the other, and its weight is
their cosine. The walk starts at an unvisited document of minimum degree and goes to the most similar unvisited
neighbour; at a dead end it jumps, an edge of weight 0, to an unvisited document of minimum degree. Degrees do not fall
during the walk: the paper removes documents from the set of unvisited ones, not from the graph. Among equals the lowest
number comes first, so the path is a function of the graph.

The walk looks at each edge twice, once from either end, so time and memory are O(edges). numba compiles the loops,
which numpy cannot express.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...kernels.host_loop import host_loop
from ..files import sync
from ..permutation import permute

NO_NEIGHBOR = 2**32 - 1
"""Filler of a list with fewer neighbours than its width."""

STEP_DTYPE = np.dtype([("document", "<u4"), ("similarity", "<f4")])
"""A step of the path: its document, and the cosine with the document before, NaN after a jump."""

CHECKPOINT_STEPS = 1 << 22
"""Number of steps between two writes of the walk, some seconds."""


class Graph(NamedTuple):
    """An undirected graph of n documents.

    The edges of document d are the neighbours that d lists, and the documents that list d and are not listed by it.
    """

    neighbors: NDArray[np.uint32]
    """[n, k], the documents that each document lists: each at most once, never itself, then NO_NEIGHBOR."""
    similarities: NDArray[np.float32]
    """[n, k], the cosines of `neighbors`."""
    first: NDArray[np.int64]
    """[n + 1]: elements first[d], ..., first[d + 1] - 1 of the next two arrays are the edges that d does not list."""
    listed_by: NDArray[np.uint32]
    """[one-way edges], the document at the other end."""
    listed_similarities: NDArray[np.float32]
    """[one-way edges], the cosines of `listed_by`."""
    degrees: NDArray[np.int64]
    """[n], the number of distinct neighbours."""


def make_graph(neighbors: NDArray[np.uint32], similarities: NDArray[np.float32]) -> Graph:
    """Return the undirected graph of all documents' lists of neighbours [n, k], with cosines [n, k]."""
    one_way, first, degrees = _one_way(neighbors)
    listed_by = np.empty(first[-1], dtype=np.uint32)
    listed_similarities = np.empty(first[-1], dtype=np.float32)
    _reverse(neighbors, similarities, one_way, first, listed_by, listed_similarities)
    return Graph(neighbors, similarities, first, listed_by, listed_similarities, degrees)


def remove_dropped(neighbors: NDArray[np.uint32], dropped: NDArray[np.bool_]) -> None:
    """Replace the dropped documents [n] in the lists of neighbours [n, k] by NO_NEIGHBOR, in place."""
    neighbors[dropped] = NO_NEIGHBOR
    # Views of about 2^20 lists each, which bounds the memory of the masks.
    for lists in np.array_split(neighbors, max(1, len(neighbors) // (1 << 20))):
        lists[(lists != NO_NEIGHBOR) & dropped[np.minimum(lists, len(dropped) - 1)]] = NO_NEIGHBOR


def greedy_path(graph: Graph, dropped: NDArray[np.bool_], file: Path) -> Iterator[int]:
    """Append the path, STEP_DTYPE, to `file`; yield the number of steps done after each write.

    The steps in the file are the state of the walk, so a walk that was killed at any point resumes from its file.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as out:
        # A killed process may have written a part of a step.
        out.truncate(out.seek(0, 2) // STEP_DTYPE.itemsize * STEP_DTYPE.itemsize)
        out.seek(0)
        before = np.fromfile(out, dtype=STEP_DTYPE)["document"]
        done = len(before)
        for some in _steps(graph, dropped, before):
            some.tofile(out)
            out.flush()
            sync(file)
            done += len(some)
            yield done


def document_order(
    neighbors: NDArray[np.integer], similarities: NDArray[np.floating], dropped: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Return documents along a path of the most similar ones, and the similarity of each to the one before.

    Row d of `neighbors` [n, k] lists documents near document d, and the same row of `similarities` [n, k] how near they
    are; the search of FAISS gives such arrays, with -1 where there is no neighbour. `dropped` [n] leaves out documents,
    such as near-duplicates. The results are uint32 and float32 [documents]; a similarity is NaN after a jump, where the
    document before had no neighbour left. The algorithm is that of In-Context Pretraining (arXiv 2310.10638). Raises
    ValueError if the arrays do not fit each other, if a row names a document outside [0, n) or one twice, or if a
    similarity of a neighbour is not finite.
    """
    n = len(neighbors)
    dropped = np.zeros(n, dtype=np.bool_) if dropped is None else np.asarray(dropped, dtype=np.bool_)
    if neighbors.ndim != 2 or neighbors.shape != similarities.shape or dropped.shape != (n,):
        raise ValueError(
            f"neighbors {neighbors.shape}, similarities {similarities.shape}, dropped {dropped.shape}: must be [n, k], "
            "[n, k] and [n]; give a row for each document"
        )
    if neighbors.size and not -1 <= int(neighbors.min()) <= int(neighbors.max()) < n:
        raise ValueError(
            f"neighbors: lists documents {neighbors.min()} to {neighbors.max()}, and there are {n}: must lie in "
            f"[0, {n}); give -1 where there is no neighbour"
        )
    # A document is no neighbour of itself, and FAISS finds it first of all.
    absent = (neighbors < 0) | (neighbors == np.arange(n)[:, None])
    lists = np.where(absent, NO_NEIGHBOR, neighbors).astype(np.uint32)
    if len(wrong := np.argwhere(~absent & ~np.isfinite(similarities))):
        row, column = wrong[0]
        raise ValueError(
            f"similarities[{row}, {column}] = {similarities[row, column]}: must be finite, since neighbors[{row}, "
            f"{column}] = {neighbors[row, column]}; give -1 there if it is no neighbour"
        )
    ordered = np.sort(lists, axis=1)  # [n, k]
    if len(twice := np.argwhere((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != NO_NEIGHBOR))):
        row, column = twice[0]
        raise ValueError(
            f"neighbors[{row}] = {neighbors[row].tolist()}: lists document {ordered[row, column]} twice; give -1 "
            "instead of the second"
        )
    remove_dropped(lists, dropped)
    graph = make_graph(lists, np.ascontiguousarray(similarities, dtype=np.float32))
    found = [np.empty(0, dtype=STEP_DTYPE), *_steps(graph, dropped, np.empty(0, dtype=np.uint32))]
    steps = np.concatenate(found)
    return steps["document"], steps["similarity"]


def _steps(graph: Graph, dropped: NDArray[np.bool_], before: NDArray[np.uint32]) -> Iterator[NDArray[np.void]]:
    """Yield the steps of the path that follow those to the documents `before`, STEP_DTYPE, some at a time."""
    visited = dropped.copy()
    visited[before] = True
    left, current = len(dropped) - int(np.count_nonzero(visited)), int(before[-1]) if len(before) else -1
    # Documents by_degree[:cursor] are visited, so the next jump goes to a document at or after the cursor.
    by_degree, cursor = _by_degree(graph.degrees), 0
    while left:
        some = np.empty(min(CHECKPOINT_STEPS, left), dtype=STEP_DTYPE)
        documents, similarities = np.empty(len(some), np.uint32), np.empty(len(some), np.float32)
        cursor, current = _walk(*graph[:5], by_degree, visited, cursor, current, documents, similarities)
        some["document"], some["similarity"] = documents, similarities
        left -= len(some)
        yield some


def random_order(num_documents: int, dropped: NDArray[np.bool_], seed: int) -> NDArray[np.uint32]:
    """Return the documents that are not dropped in random order, uint32 [documents]; baseline "random"."""
    shuffled = permute(np.arange(num_documents), num_documents, key=(seed, "order")).astype(np.uint32)
    return shuffled[~dropped[shuffled]]


def nearest_groups(neighbors: NDArray[np.uint32], dropped: NDArray[np.bool_], seed: int) -> NDArray[np.uint32]:
    """Return the documents that are not dropped, each followed by those of its neighbours [k] not yet in the order.

    The documents are taken in random order. This is the paper's kNN baseline, in which no document comes twice here.
    The result is uint32 [documents].
    """
    order = random_order(len(dropped), dropped, seed)
    return _nearest_groups(neighbors, order, dropped.copy())


@host_loop
def _one_way(neighbors):  # pragma: no cover  (compiled)
    """Return which listed edges [n, k] are not listed from the other end, `Graph.first` and `Graph.degrees`."""
    n, k = neighbors.shape
    one_way = np.zeros((n, k), np.bool_)
    first, degrees = np.zeros(n + 1, np.int64), np.zeros(n, np.int64)
    for document in range(n):
        for slot in range(k):
            other = neighbors[document, slot]
            if other == NO_NEIGHBOR:
                continue
            degrees[document] += 1
            mutual = False
            for back in range(k):
                if neighbors[other, back] == document:
                    mutual = True
                    break
            if not mutual:
                one_way[document, slot] = True
                first[other + 1] += 1
                degrees[other] += 1
    # first[d + 1] is the number of one-way edges to d; the running sums are the begins.
    for document in range(n):
        first[document + 1] += first[document]
    return one_way, first, degrees


@host_loop
def _reverse(neighbors, similarities, one_way, first, listed_by, listed_similarities):  # pragma: no cover
    """Write the one-way edges under the document at their other end: `Graph.listed_by` and `listed_similarities`."""
    n, k = neighbors.shape
    position = first[:-1].copy()  # [n], the next free element of each document
    for document in range(n):
        for slot in range(k):
            if one_way[document, slot]:
                other = neighbors[document, slot]
                listed_by[position[other]] = document
                listed_similarities[position[other]] = similarities[document, slot]
                position[other] += 1


@host_loop
def _by_degree(degrees):  # pragma: no cover
    """Return the documents by degree, equals by number [n], by a counting sort."""
    position = np.zeros(degrees.max() + 2, np.int64)
    for degree in degrees:
        position[degree + 1] += 1
    # position[degree] is the index of the next document of that degree.
    for degree in range(len(position) - 1):
        position[degree + 1] += position[degree]
    order = np.empty(len(degrees), np.uint32)
    for document in range(len(degrees)):
        order[position[degrees[document]]] = document
        position[degrees[document]] += 1
    return order


@host_loop
def _walk(
    neighbors,
    similarities,
    first,
    listed_by,
    listed_similarities,
    by_degree,
    visited,
    cursor,
    current,
    documents,
    steps,
):  # pragma: no cover
    """Walk len(documents) steps on from `current` (-1: a jump); return the new cursor and document."""
    k = neighbors.shape[1]
    for step in range(len(documents)):
        best, best_similarity = -1, np.float32(-np.inf)
        if current >= 0:
            for slot in range(k):
                other = np.int64(neighbors[current, slot])
                if other != NO_NEIGHBOR and not visited[other]:
                    similarity = similarities[current, slot]
                    if similarity > best_similarity or (similarity == best_similarity and other < best):
                        best, best_similarity = other, similarity
            for edge in range(first[current], first[current + 1]):
                other = np.int64(listed_by[edge])
                if not visited[other]:
                    similarity = listed_similarities[edge]
                    if similarity > best_similarity or (similarity == best_similarity and other < best):
                        best, best_similarity = other, similarity
        # A dead end, or the first step: jump to the unvisited document of least degree.
        if best < 0:
            while visited[by_degree[cursor]]:
                cursor += 1
            best, best_similarity = np.int64(by_degree[cursor]), np.float32(np.nan)
        visited[best] = True
        documents[step], steps[step] = best, best_similarity
        current = best
    return cursor, current


@host_loop
def _nearest_groups(neighbors, order, visited):  # pragma: no cover
    """Return the documents of `order` [n], each followed by its unvisited neighbours."""
    documents = np.empty(len(order), np.uint32)
    count = 0
    for document in order:
        if visited[document]:
            continue
        documents[count] = document
        visited[document] = True
        count += 1
        for slot in range(neighbors.shape[1]):
            other = neighbors[document, slot]
            if other != NO_NEIGHBOR and not visited[other]:
                documents[count] = other
                visited[other] = True
                count += 1
    return documents
