"""The quality of the shuffle, by statistics that numpy's own permutation passes within the same bounds.

A statistic is a chi-square given in standard deviations from its mean. All seeds are fixed.
"""

from collections.abc import Callable, Iterable

import numpy as np
import pytest
from longring.data import permutation
from longring.data.permutation import permute
from numpy.typing import NDArray

DEVIATIONS = 5.0
"""Largest statistic that a true shuffle may have; as all seeds are fixed, a test passes always or never."""

KEYS = 3_000
Shuffle = Callable[[int, int], NDArray[np.int64]]


def ours(size: int, key: int) -> NDArray[np.int64]:
    return permute(np.arange(size), size, ("quality", key))


def numpys(size: int, key: int) -> NDArray[np.int64]:
    return np.random.default_rng([size, key]).permutation(size)


def deviations(counts: NDArray, expected: float, degrees: int, scale: float = 1.0) -> float:
    chi_square = ((counts - expected) ** 2 / expected).sum() * scale
    return float((chi_square - degrees) / (2 * degrees) ** 0.5)


def over_keys(orders: NDArray[np.int64]) -> dict[str, float]:
    """Return the statistics of small permutations [keys, size]: of positions, and of the pairs at a distance."""
    keys, size = orders.shape
    counts = np.stack([np.bincount(orders[:, item], minlength=size) for item in range(size)])
    # Rows and columns of the table have fixed sums, which leaves (size - 1)^2 degrees of freedom.
    found = {"positions": deviations(counts, keys / size, (size - 1) ** 2, (size - 1) / size)}
    for lag in (1, 2):
        if lag < size > 2:
            pairs = np.bincount((orders[:, :-lag] * size + orders[:, lag:]).ravel(), minlength=size**2)
            different = pairs.reshape(size, size)[~np.eye(size, dtype=bool)]
            found[f"pairs at {lag}"] = deviations(different, keys * (size - lag) / len(different), len(different))
    return found


def within_one(order: NDArray[np.int64], lags: Iterable[int]) -> dict[str, float]:
    """Return the statistics of one large permutation [size]: of positions, and of serial correlation at `lags`."""
    size, bins = len(order), 16
    into = order * bins // size
    table = np.bincount(np.arange(size) * bins // size * bins + into, minlength=bins**2)
    found = {"positions": deviations(table, size / bins**2, (bins - 1) ** 2)}
    for lag in lags:
        pairs = np.bincount(into[:-lag] * bins + into[lag:], minlength=bins**2)
        found[f"pairs at {lag}"] = deviations(pairs, (size - lag) / bins**2, (bins - 1) ** 2)
        centred = order - (size - 1) / 2
        # The correlation of n pairs of a true shuffle has mean about 0 and deviation 1 / sqrt(n).
        correlation = (centred[:-lag] * centred[lag:]).mean() / (centred**2).mean()
        found[f"correlation at {lag}"] = abs(float(correlation)) * (size - lag) ** 0.5
    return found


def assert_within_bounds(statistics: dict[str, float]) -> None:
    assert max(statistics.values()) < DEVIATIONS, statistics


@pytest.mark.parametrize("shuffle", [ours, numpys])
@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7, 8, 11])
def test_small_ranges_over_many_keys(size: int, shuffle: Shuffle):
    assert_within_bounds(over_keys(np.stack([shuffle(size, key) for key in range(KEYS)])))


@pytest.mark.parametrize("size", [12, 16, 17, 25, 30])
def test_the_rounds_of_large_ranges_over_many_keys(size: int, monkeypatch: pytest.MonkeyPatch):
    """The rounds are fewest beside the smallest sides: on these sizes four of them are off by 35 deviations or more."""
    monkeypatch.setattr(permutation, "SORTED_SIZE", 0)
    assert_within_bounds(over_keys(np.stack([ours(size, key) for key in range(KEYS)])))
    monkeypatch.setattr(permutation, "ROUNDS", 4)
    assert max(over_keys(np.stack([ours(size, key) for key in range(KEYS)])).values()) > 4 * DEVIATIONS


@pytest.mark.parametrize("shuffle", [ours, numpys])
@pytest.mark.parametrize("size", [2_048, 2_049, 4_096, 65_537, 300_007])
def test_one_large_permutation(size: int, shuffle: Shuffle):
    side = permutation.isqrt(size - 1) + 1  # items at this distance share a side of the rounds
    for key in range(3):
        assert_within_bounds(within_one(shuffle(size, key), (1, 2, 3, side - 1, side, 2 * side)))


@pytest.mark.parametrize(
    ("size", "images"),
    [
        (10, [6, 5, 1, 8, 9, 0, 3, 4, 2, 7]),
        (2_048, [999, 46, 1577, 1547, 512, 960, 1774, 1194, 577, 497]),
        (2_049, [1336, 1826, 39, 70, 232, 859, 1326, 344, 850, 996]),
        (
            2**40,
            [
                1086205877183,
                322073905432,
                704700423027,
                97931471951,
                862969199461,
                251352119747,
                5413247635,
                234302968491,
                251649738635,
                149597849938,
            ],
        ),
    ],
)
def test_the_order_of_known_keys(size: int, images: list[int]):
    """A run that resumes with a later LongRing reads the sequences that it would have read: the order never changes."""
    assert permute(np.arange(10), size, (7, "known")).tolist() == images
