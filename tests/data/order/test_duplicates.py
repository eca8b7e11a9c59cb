"""Near-duplicates are found, and one document of each pair is kept."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from longring.data.order.duplicates import (
    BINS,
    SAMPLED_PAIRS,
    Histogram,
    bin_edges,
    choose_dropped,
    confirmed_pairs,
    histogram,
    jaccard,
)
from longring.data.order.path import NO_NEIGHBOR
from longring.data.permutation import mix_bits


@settings(max_examples=200)
@given(st.lists(st.integers(0, 3), max_size=30), st.lists(st.integers(0, 3), max_size=30))
def test_shared_is_the_jaccard_similarity_of_shingles(one: list[int], other: list[int]):
    def sets(tokens: list[int]) -> set[tuple[int, ...]]:
        width = min(5, len(tokens))
        return {tuple(tokens[start : start + width]) for start in range(len(tokens) - width + 1)}

    first, second = sets(one), sets(other)
    expected = len(first & second) / len(first | second)
    assert jaccard(np.array(one, dtype=np.uint16), np.array(other, dtype=np.uint16)) == expected


@settings(max_examples=200)
@given(st.sets(st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(lambda pair: pair[0] > pair[1])))
def test_one_of_any_two_stays_and_none_goes_for_nothing(pairs: set[tuple[int, int]]):
    found = choose_dropped(np.array(sorted(pairs), dtype=np.uint32).reshape(-1, 2), 10).tolist()
    gone = [document for document, _ in found]
    assert len(gone) == len(set(gone))
    assert not any(one not in gone and other not in gone for one, other in pairs), "no two near-duplicates stay"
    assert all((document, kept) in pairs and kept not in gone for document, kept in found)


def lists(cosines: list[list[float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return documents 0, 1, ... that list documents 1000, 1001, ... with these cosines."""
    found = np.array(cosines, dtype=np.float32)
    ids = np.broadcast_to(np.arange(found.shape[1], dtype=np.uint32) + 1000, found.shape).copy()
    return np.arange(len(found)), ids, found


def test_histogram_counts_pairs_and_samples_them():
    rows = [[0.985, 0.62], [0.985, 0.3], [0.625, -0.5], [1.0, 0.999]] * 40
    documents, ids, cosines = lists(rows)
    ids[0, 0] = NO_NEIGHBOR
    like = np.arange(50)
    unlike = {number: np.arange(50) + 1000 * number for number in [*range(160), 1001]}

    def tokens(number: int) -> np.ndarray:
        return like if number in (1000, *range(0, 160, 4), *range(1, 160, 4)) else unlike[number]

    whole = histogram(iter([(documents, ids, cosines)]), tokens, 0.7)
    parts = [(documents[part], ids[part], cosines[part]) for part in (slice(90, 160), slice(0, 90))]
    again = histogram(iter(parts), tokens, 0.7)
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_array_equal(one, other)
    at = {edge: number for number, edge in enumerate(bin_edges())}
    assert len(at) == BINS
    assert whole.pairs[at[0.98]] == 79
    assert whole.pairs[at[0.62]] == 80
    assert whole.pairs[at[0.99]] == 80
    assert whole.pairs.sum() == 239
    assert whole.sampled[at[0.98]] == SAMPLED_PAIRS
    assert whole.confirmed[at[0.98]] == SAMPLED_PAIRS, "all of these are alike"
    assert whole.confirmed[at[0.62]] == whole.confirmed[at[0.99]] == 0
    assert whole.threshold() == 0.98


@pytest.mark.parametrize(("confirmed", "threshold"), [([0, 0, 0], 1.01), ([0, 3, 0], 1.01), ([0, 4, 64], 0.51)])
def test_the_threshold_is_where_a_twentieth_is_near_duplicate(confirmed: list[int], threshold: float):
    counts = np.array([*confirmed, *[0] * (BINS - 3)])
    assert Histogram(counts, np.where(counts >= 0, SAMPLED_PAIRS, 0), counts).threshold() == threshold


def test_pairs_are_confirmed_above_the_threshold_only():
    texts = {number: np.arange(60, dtype=np.uint32) + 7 for number in range(8)}
    texts[3] = np.arange(60, dtype=np.uint32) * 2
    documents = np.array([4, 5])
    ids = np.array([[1, 3, 7, NO_NEIGHBOR], [2, 4, 6, 7]], dtype=np.uint32)
    cosines = np.array([[0.99, 0.99, 0.9, np.inf], [0.89, 0.9, 0.95, 0.2]], dtype=np.float32)
    found = confirmed_pairs(documents, ids, cosines, texts.__getitem__, 0.9, 0.7)
    assert found.tolist() == [[4, 1], [5, 4], [6, 5], [7, 4]]


@pytest.mark.parametrize("parts", [1, 3, 40])
def test_sampled_pairs_do_not_depend_on_how_the_lists_come(parts: int):
    """The sample of each bin is the 64 pairs with the smallest keys of all pairs, however the lists are divided."""
    generator = np.random.default_rng(0)
    documents, ids = np.arange(200), generator.integers(200, 9_000, (200, 5)).astype(np.uint32)
    cosines = generator.choice(np.array([0.515, 0.525, 0.915], dtype=np.float32), (200, 5))
    compared: list[tuple[int, int]] = []
    asked: list[int] = []

    def tokens(number: int) -> np.ndarray:
        asked.append(number)
        if len(asked) == 2:
            compared.append((asked[0], asked[1]))
            asked.clear()
        return np.arange(5)

    rows = np.array_split(documents, parts)
    found = histogram(((documents[some], ids[some], cosines[some]) for some in rows), tokens, 0.7)
    keys = mix_bits(mix_bits(np.repeat(documents, 5).astype(np.uint64)) ^ ids.ravel().astype(np.uint64))
    expected: set[tuple[int, int]] = set()
    for cosine in np.unique(cosines):
        here = np.flatnonzero(cosines.ravel() == cosine)
        chosen = here[np.argsort(keys[here])[:SAMPLED_PAIRS]]
        expected |= {(int(position) // 5, int(ids.ravel()[position])) for position in chosen}
    assert set(compared) == expected
    assert found.sampled.sum() == len(compared) == 3 * SAMPLED_PAIRS
