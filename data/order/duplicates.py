"""Near-duplicates among neighbours: close by cosine, confirmed by shared shingles, one of them kept.

In-Context Pretraining leaves near-duplicates out before the path is walked, and is worse than random without (8.3
against 7.3 perplexity); it does not say at which cosine. Here the corpus does: of the pairs in each range of cosines
some are compared by their shingles, and from the lowest range on in which a twentieth are near-duplicates, all are.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ..permutation import mix_bits
from .path import NO_NEIGHBOR

SHINGLE_TOKENS = 5
FIRST_COSINE = 0.5
BINS = 50
"""The histogram has one for each hundredth from FIRST_COSINE to 1."""

SAMPLED_PAIRS = 64
"""Pairs of a bin that are compared."""

WORTH_COMPARING = 0.05
"""Share of near-duplicates in a bin from which all of its pairs are compared."""

Tokens = Callable[[int], NDArray[np.unsignedinteger]]


class Histogram(NamedTuple):
    """Pairs of neighbours by cosine."""

    pairs: NDArray[np.int64]
    """[bins], pairs in each hundredth; a pair that lists each other counts once for each."""
    sampled: NDArray[np.int64]
    """[bins], pairs compared."""
    confirmed: NDArray[np.int64]
    """[bins], near-duplicates among them."""

    def threshold(self) -> float:
        """Return the cosine from which pairs are compared; above 1 when no bin is worth it."""
        [worth] = np.nonzero(self.confirmed > WORTH_COMPARING * self.sampled)
        return bin_edges()[int(worth[0])] if len(worth) else 1.01


def bin_edges() -> list[float]:
    """Return the bins' lower edges, exact hundredths."""
    return [round(FIRST_COSINE + bin_number / 100, 2) for bin_number in range(BINS)]


def histogram(
    lists: Iterator[tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]]], tokens: Tokens, overlap: float
) -> Histogram:
    """Count neighbours (documents [n], ids [n, k], cosines [n, k]) by cosine, and compare some pairs of every bin."""
    counts = np.zeros(BINS, dtype=np.int64)
    # Of each bin the pairs with the smallest keys: a sample that does not depend on how the lists come.
    samples = [np.empty((0, 3), dtype=np.uint64) for _ in range(BINS)]
    limits = np.full(BINS, np.iinfo(np.uint64).max)
    for documents, ids, cosines in lists:
        bins = np.minimum(((cosines - FIRST_COSINE) * 100).astype(np.float64), BINS - 1)
        rows, slots = np.nonzero((ids != NO_NEIGHBOR) & (bins >= 0))
        numbers = bins[rows, slots].astype(np.int64)
        counts += np.bincount(numbers, minlength=BINS)
        pairs = np.stack([documents[rows].astype(np.uint64), ids[rows, slots].astype(np.uint64)], axis=1)
        keys = mix_bits(mix_bits(pairs[:, 0]) ^ pairs[:, 1])
        # Once a bin has its sample few keys are smaller than its largest.
        [smaller] = np.nonzero(keys < limits[numbers])
        numbers, pairs, keys = numbers[smaller], pairs[smaller], keys[smaller]
        for number in np.unique(numbers).tolist():
            here = numbers == number
            known = np.concatenate([samples[number], np.column_stack([keys[here], pairs[here]])])
            samples[number] = known = known[np.argsort(known[:, 0], kind="stable")[:SAMPLED_PAIRS]]
            if len(known) == SAMPLED_PAIRS:
                limits[number] = known[-1, 0]
    compared = [[shared(tokens(int(a)), tokens(int(b))) >= overlap for _, a, b in sample] for sample in samples]
    return Histogram(counts, np.array([len(one) for one in compared]), np.array([sum(one) for one in compared]))


def confirmed_pairs(
    documents: NDArray[np.int64],
    ids: NDArray[np.uint32],
    cosines: NDArray[np.float32],
    tokens: Tokens,
    threshold: float,
    overlap: float,
) -> NDArray[np.uint32]:
    """Return the near-duplicates (later document, earlier one) [pairs, 2] among neighbours of at least `threshold`."""
    found = []
    for row, slot in np.argwhere((ids != NO_NEIGHBOR) & (cosines >= threshold)).tolist():
        one, other = int(documents[row]), int(ids[row, slot])
        if shared(tokens(one), tokens(other)) >= overlap:
            found.append((max(one, other), min(one, other)))
    return np.unique(np.array(found, dtype=np.uint32).reshape(-1, 2), axis=0)


def left_out(pairs: NDArray[np.uint32], num_documents: int) -> NDArray[np.uint32]:
    """Return (document left out, the one kept in its place) [documents, 2] of near-duplicate pairs (later, earlier).

    In order of their numbers a document is left out when a near-duplicate of it stays: so one of any two stays, and
    none goes that is like no other that stays.
    """
    ordered = np.unique(pairs, axis=0)
    return ordered[_greedy(ordered, np.zeros(num_documents, dtype=np.bool_))]


@njit(cache=True)
def _greedy(pairs, dropped):  # pragma: no cover  (compiled)
    chosen = np.zeros(len(pairs), np.bool_)
    for pair in range(len(pairs)):
        if not dropped[pairs[pair, 1]] and not dropped[pairs[pair, 0]]:
            chosen[pair] = dropped[pairs[pair, 0]] = True
    return chosen


def shared(one: NDArray[np.unsignedinteger], other: NDArray[np.unsignedinteger]) -> float:
    """Return the Jaccard similarity of two documents' sets of token shingles (Broder, 1997)."""
    first, second = shingles(one), shingles(other)
    both = len(np.intersect1d(first, second, assume_unique=True))
    return both / (len(first) + len(second) - both)


def shingles(tokens: NDArray[np.unsignedinteger]) -> NDArray[np.uint64]:
    """Return the hashes of every 5 adjacent tokens, each once; of a shorter document that of all of it."""
    width = min(SHINGLE_TOKENS, len(tokens))
    # Not from 0, which mixing leaves as it is: shingles of another length would have the same hash.
    hashes = np.full(len(tokens) - width + 1, 0x9E3779B97F4A7C15, dtype=np.uint64)
    for place in range(width):
        hashes = mix_bits(hashes + tokens[place : place + len(hashes)].astype(np.uint64))
    return np.unique(hashes)
