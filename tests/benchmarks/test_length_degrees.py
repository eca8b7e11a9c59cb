"""benchmarks/length_degrees.py: every member has the same sequences, and the solver finds what is known to be best."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from length_degrees import packed_rows, sequences_of, shares_of
from lib.degree_solver import Unit, best_degrees, least_rank_seconds

LONG_OR_SHORT = [Unit(4, 2, 4.0, 2), Unit(4, 4, 2.0, 4), Unit(1, 1, 1.0, 4)]
"""A long sequence on 2 or 4 ranks, and short ones."""


@pytest.mark.parametrize(
    ("each_s", "seconds", "num_micro_batches"),
    [
        (0.0, 3.0, 2),  # the long one on all four ranks, then a short one on each
        (2.0, 6.0, 1),  # the long one on two ranks, beside two short ones on each of the others
    ],
)
def test_the_solver_weighs_degrees_against_micro_batches(each_s, seconds, num_micro_batches):
    found = best_degrees(LONG_OR_SHORT, {4: 1, 1: 4}, 4, each_s)
    assert (found.seconds, found.num_micro_batches) == (pytest.approx(seconds), num_micro_batches)
    assert found.num_degrees == (2.0 if num_micro_batches == 1 else 1.0)


def test_the_bound_has_every_sequence_on_its_best_degree():
    assert least_rank_seconds([*LONG_OR_SHORT, Unit(4, 8, 1.5, 8)], {4: 1, 1: 4}) == 8.0 + 4.0


@pytest.mark.parametrize("recipe", ["prolong-64k", "prolong-512k", "olmo-3-7b-64k"])
def test_packed_rows_are_full_and_hold_every_sequence(recipe):
    shares = shares_of(recipe, 2**17)
    assert max(shares) == 2**17 and sum(shares.values()) == pytest.approx(1.0)
    sequences = sequences_of(shares, 2**23)
    assert sum(sequences) == 2**23
    tokens = Counter(sequences)
    for length, share in shares.items():
        # What is owed of longer buckets is less than one of their sequences each.
        owed = sum(other for other in shares if other > length)
        assert share * 2**23 - length <= length * tokens[length] <= share * 2**23 + owed
    rows = packed_rows(sequences, 2**17, random.Random(0))
    assert {sum(row) for row in rows} == {2**17}
    assert Counter(length for row in rows for length in row) == tokens
