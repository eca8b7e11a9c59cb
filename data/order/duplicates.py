"""Near-duplicates among neighbours: found by cosine, confirmed by shared shingles; one document of each pair is kept.

In-Context Pretraining drops near-duplicates before the walk; without this step it is worse than random order (8.3
against 7.3 perplexity). The paper gives no threshold, so the corpus chooses it: a sample of the pairs in each hundredth
of cosine is compared by shingles. All pairs are compared from the lowest hundredth on in which more than a twentieth of
the sample are near-duplicates.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...kernels.host_loop import host_loop
from ..permutation import mix_bits
from .path import NO_NEIGHBOR

SHINGLE_TOKENS = 5
"""Number of adjacent tokens in a shingle."""
FIRST_COSINE = 0.5
"""Lower end of the histogram of cosines."""
BINS = 50
"""Number of bins of the histogram, one for each hundredth from FIRST_COSINE to 1."""
NO_COSINE = 1.01
"""Threshold above every cosine: no pair is compared."""

SAMPLED_PAIRS = 64
"""Number of pairs of each bin that are compared to choose the threshold."""

WORTH_COMPARING = 0.05
"""Fraction of near-duplicates in a bin's sample above which all pairs of the bin are compared."""

Tokens = Callable[[int], NDArray[np.unsignedinteger]]
"""A function from a document to its tokens [n]."""


class Histogram(NamedTuple):
    """Histogram of the pairs of neighbours by cosine."""

    pairs: NDArray[np.int64]
    """[bins], pairs in each bin; a pair whose documents list each other counts twice."""
    sampled: NDArray[np.int64]
    """[bins], pairs compared."""
    confirmed: NDArray[np.int64]
    """[bins], near-duplicates among the compared pairs."""

    def threshold(self) -> float:
        """Return the cosine from which all pairs are compared; NO_COSINE if no bin has enough near-duplicates."""
        [worth] = np.nonzero(self.confirmed > WORTH_COMPARING * self.sampled)
        return bin_edges()[int(worth[0])] if len(worth) else NO_COSINE


def bin_edges() -> list[float]:
    """Return the lower edges of the bins, exact hundredths."""
    return [round(FIRST_COSINE + bin_number / 100, 2) for bin_number in range(BINS)]


def histogram(
    lists: Iterator[tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]]], tokens: Tokens, overlap: float
) -> Histogram:
    """Return the histogram of neighbours by cosine, with a sample of every bin compared by shingles.

    `lists` yields documents [n], their neighbours [n, k] and cosines [n, k]. A pair is a near-duplicate if its Jaccard
    similarity is at least `overlap`.
    """
    counts = np.zeros(BINS, dtype=np.int64)
    # [pairs, (key, document, neighbour)] for each bin: the pairs with the smallest hashed keys, a sample that does not
    # depend on the order of the lists. A key at or above the bin's limit is not in the sample.
    samples = [np.empty((0, 3), dtype=np.uint64) for _ in range(BINS)]
    limits = np.full(BINS, np.iinfo(np.uint64).max)
    for documents, ids, cosines in lists:
        bins = np.minimum(((cosines - FIRST_COSINE) * 100).astype(np.float64), BINS - 1)
        rows, slots = np.nonzero((ids != NO_NEIGHBOR) & (bins >= 0))
        numbers = bins[rows, slots].astype(np.int64)
        counts += np.bincount(numbers, minlength=BINS)
        pairs = np.stack([documents[rows].astype(np.uint64), ids[rows, slots].astype(np.uint64)], axis=1)
        keys = mix_bits(mix_bits(pairs[:, 0]) ^ pairs[:, 1])
        # Once a bin has a full sample, few keys are below its limit.
        [smaller] = np.nonzero(keys < limits[numbers])
        numbers, pairs, keys = numbers[smaller], pairs[smaller], keys[smaller]
        for number in np.unique(numbers).tolist():
            here = numbers == number
            known = np.concatenate([samples[number], np.column_stack([keys[here], pairs[here]])])
            samples[number] = known = known[np.argsort(known[:, 0], kind="stable")[:SAMPLED_PAIRS]]
            if len(known) == SAMPLED_PAIRS:
                limits[number] = known[-1, 0]
    matches = [[jaccard(tokens(int(a)), tokens(int(b))) >= overlap for _, a, b in sample] for sample in samples]
    return Histogram(counts, np.array([len(match) for match in matches]), np.array([sum(match) for match in matches]))


def confirmed_pairs(
    documents: NDArray[np.int64],
    ids: NDArray[np.uint32],
    cosines: NDArray[np.float32],
    tokens: Tokens,
    threshold: float,
    overlap: float,
) -> NDArray[np.uint32]:
    """Return the near-duplicate pairs (later document, earlier document) of one input shard, uint32 [pairs, 2].

    `ids` and `cosines` [n, k] are the neighbours of `documents` [n]. Neighbours with a cosine of at least `threshold`
    are compared; a pair is a near-duplicate if its Jaccard similarity is at least `overlap`.
    """
    found = []
    for row, slot in np.argwhere((ids != NO_NEIGHBOR) & (cosines >= threshold)).tolist():
        one, other = int(documents[row]), int(ids[row, slot])
        if jaccard(tokens(one), tokens(other)) >= overlap:
            found.append((max(one, other), min(one, other)))
    return np.unique(np.array(found, dtype=np.uint32).reshape(-1, 2), axis=0)


def choose_dropped(pairs: NDArray[np.uint32], num_documents: int) -> NDArray[np.uint32]:
    """Return (dropped document, kept document), uint32 [dropped, 2], for near-duplicate pairs (later, earlier) [n, 2].

    Documents are taken in order, and one is dropped if a near-duplicate of it is kept. So at most one document of a
    near-duplicate pair is kept, and every dropped document has a near-duplicate that is kept.
    """
    # Sorted by the later document, so whether the earlier one of a pair is dropped is decided before the pair.
    ordered = np.unique(pairs, axis=0)
    return ordered[_greedy(ordered, np.zeros(num_documents, dtype=np.bool_))]


@host_loop
def _greedy(pairs, dropped):  # pragma: no cover  (compiled)
    """Return the mask [pairs] of the pairs whose first document is dropped for the second; marks it in `dropped`."""
    chosen = np.zeros(len(pairs), np.bool_)
    for pair in range(len(pairs)):
        if not dropped[pairs[pair, 1]] and not dropped[pairs[pair, 0]]:
            chosen[pair] = dropped[pairs[pair, 0]] = True
    return chosen


def jaccard(one: NDArray[np.unsignedinteger], other: NDArray[np.unsignedinteger]) -> float:
    """Return the Jaccard similarity of two documents' sets of token shingles (Broder, 1997); tokens are [n] and [m]."""
    first, second = shingles(one), shingles(other)
    both = len(np.intersect1d(first, second, assume_unique=True))
    return both / (len(first) + len(second) - both)


def shingles(tokens: NDArray[np.unsignedinteger]) -> NDArray[np.uint64]:
    """Return the distinct hashes of every 5 adjacent `tokens` [n]; a shorter document has one hash, of all tokens."""
    width = min(SHINGLE_TOKENS, len(tokens))
    # The start is not 0, which mixing does not change: shingles of leading zeros would have one hash at any length.
    hashes = np.full(len(tokens) - width + 1, 0x9E3779B97F4A7C15, dtype=np.uint64)
    for offset in range(width):
        hashes = mix_bits(hashes + tokens[offset : offset + len(hashes)].astype(np.uint64))
    return np.unique(hashes)
