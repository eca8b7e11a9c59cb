"""A path through all documents along the most similar ones: a greedy maximum travelling salesman.

In-Context Pretraining, arXiv 2310.10638, section 2.2 and Algorithm 1, whose line 7 prints argmin for argmax. The graph
is undirected: an edge where either document lists the other, its weight their cosine. The walk starts at an unvisited
document of minimum degree and goes to the most similar unvisited neighbour; at a dead end it jumps, an edge of weight
0, to an unvisited document of minimum degree. Degrees are the graph's own: the paper removes documents from the set of
those left, not from the graph. Of equals the lowest number goes first, so the path is a function of the graph.

Each edge is looked at twice, once from either end, so time and memory are O(edges), all in arrays: numba compiles the
three loops, which numpy cannot express.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ..files import sync
from ..permutation import permute

NO_NEIGHBOR = 2**32 - 1
"""Fills a list of neighbours that has fewer than its width."""

STEP_DTYPE = np.dtype([("document", "<u4"), ("similarity", "<f4")])
"""A step of the path, and the cosine with the step before; NaN where it jumped there."""

CHECKPOINT_STEPS = 1 << 22
"""Steps between two writes: some seconds."""


class Graph(NamedTuple):
    """Undirected, n documents. Edges of d: those it lists, and those of documents that list d and are not listed."""

    neighbors: NDArray[np.uint32]
    """[n, k], what each document lists: others only, each once, and NO_NEIGHBOR."""
    similarities: NDArray[np.float32]
    """[n, k], their cosines."""
    first: NDArray[np.int64]
    """[n + 1], where the edges of d that it does not list begin in the next two."""
    listed_by: NDArray[np.uint32]
    listed_similarities: NDArray[np.float32]
    degrees: NDArray[np.int64]
    """[n], distinct neighbours."""


def make_graph(neighbors: NDArray[np.uint32], similarities: NDArray[np.float32]) -> Graph:
    """Return the graph of each document's list of neighbours [n, k] with cosines [n, k]."""
    one_way, first, degrees = _one_way(neighbors)
    listed_by = np.empty(first[-1], dtype=np.uint32)
    listed_similarities = np.empty(first[-1], dtype=np.float32)
    _turn_round(neighbors, similarities, one_way, first, listed_by, listed_similarities)
    return Graph(neighbors, similarities, first, listed_by, listed_similarities, degrees)


def leave_out(neighbors: NDArray[np.uint32], dropped: NDArray[np.bool_]) -> None:
    """Take the dropped documents [n] out of the lists [n, k], in place."""
    neighbors[dropped] = NO_NEIGHBOR
    for row in np.array_split(neighbors, max(1, len(neighbors) // (1 << 20))):
        row[(row != NO_NEIGHBOR) & dropped[np.minimum(row, len(dropped) - 1)]] = NO_NEIGHBOR


def greedy_path(graph: Graph, dropped: NDArray[np.bool_], file: Path) -> Iterator[int]:
    """Write the path, STEP_DTYPE, to `file`, yielding the steps done so far after each write.

    The file only grows, and what it has says where the walk is: called again after an end at any point, it goes on.
    """
    steps = len(dropped) - int(np.count_nonzero(dropped))
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as out:
        out.truncate(out.seek(0, 2) // STEP_DTYPE.itemsize * STEP_DTYPE.itemsize)
        out.seek(0)
        before = np.fromfile(out, dtype=STEP_DTYPE)["document"]
        visited = dropped.copy()
        visited[before] = True
        done, current = len(before), int(before[-1]) if len(before) else -1
        by_degree, cursor = _by_degree(graph.degrees), 0
        while done < steps:
            some = np.empty(min(CHECKPOINT_STEPS, steps - done), dtype=STEP_DTYPE)
            documents, similarities = np.empty(len(some), np.uint32), np.empty(len(some), np.float32)
            cursor, current = _walk(*graph[:5], by_degree, visited, cursor, current, documents, similarities)
            some["document"], some["similarity"] = documents, similarities
            some.tofile(out)
            out.flush()
            sync(file)
            done += len(some)
            yield done


def random_order(num_documents: int, dropped: NDArray[np.bool_], seed: int) -> NDArray[np.uint32]:
    """Return the documents that are not dropped, shuffled."""
    shuffled = permute(np.arange(num_documents), num_documents, key=(seed, "order")).astype(np.uint32)
    return shuffled[~dropped[shuffled]]


def nearest_groups(neighbors: NDArray[np.uint32], dropped: NDArray[np.bool_], seed: int) -> NDArray[np.uint32]:
    """Return the documents that are not dropped: in random order each one left, followed by its nearest that are left.

    The paper's kNN baseline, but no document comes twice.
    """
    order = random_order(len(dropped), dropped, seed)
    return _nearest_groups(neighbors, order, dropped.copy())


@njit(cache=True)
def _one_way(neighbors):  # pragma: no cover  (compiled)
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
    for document in range(n):
        first[document + 1] += first[document]
    return one_way, first, degrees


@njit(cache=True)
def _turn_round(neighbors, similarities, one_way, first, listed_by, listed_similarities):  # pragma: no cover
    n, k = neighbors.shape
    place = first[:-1].copy()
    for document in range(n):
        for slot in range(k):
            if one_way[document, slot]:
                other = neighbors[document, slot]
                listed_by[place[other]] = document
                listed_similarities[place[other]] = similarities[document, slot]
                place[other] += 1


@njit(cache=True)
def _by_degree(degrees):  # pragma: no cover
    """Documents by degree, equals by number: a counting sort."""
    place = np.zeros(degrees.max() + 2, np.int64)
    for degree in degrees:
        place[degree + 1] += 1
    for degree in range(len(place) - 1):
        place[degree + 1] += place[degree]
    order = np.empty(len(degrees), np.uint32)
    for document in range(len(degrees)):
        order[place[degrees[document]]] = document
        place[degrees[document]] += 1
    return order


@njit(cache=True)
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
        if best < 0:
            while visited[by_degree[cursor]]:
                cursor += 1
            best, best_similarity = np.int64(by_degree[cursor]), np.float32(np.nan)
        visited[best] = True
        documents[step], steps[step] = best, best_similarity
        current = best
    return cursor, current


@njit(cache=True)
def _nearest_groups(neighbors, order, visited):  # pragma: no cover
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
