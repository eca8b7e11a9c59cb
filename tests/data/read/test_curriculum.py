import itertools
import math
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from longring.data.config import CurriculumConfig
from longring.data.read.curriculum import bucket_odds, exact_log, step_buckets

ODDS: list = ["uniform", "natural", "grow_linear", "grow_p2", "grow_p100", "shrink_p100", (5.0, 1.0, 2.5)]
DRAWS = ["odds_times_left", "odds_times_batches", "odds"]
PAPER_ODDS = {
    "uniform": [1, 1, 1],
    "natural": [1, 1, 1],
    "grow_linear": [3, 2, 1],
    "grow_p2": [4, 2, 1],
    "grow_p100": [10_000, 100, 1],
    "shrink_p100": [1, 100, 10_000],
    (5.0, 1.0, 2.5): [5, 1, 2.5],
}


def curriculum(odds: Any = "grow_p2", cycles: int = 1, draw: Any = "odds_times_left") -> CurriculumConfig:
    return CurriculumConfig(odds=odds, cycles=cycles, draw=draw)


@given(
    st.lists(st.integers(0, 10**12), min_size=1, max_size=8).filter(any),
    st.integers(1, 300),
    st.sampled_from(ODDS[:-1]),
    st.sampled_from(DRAWS),
    st.integers(1, 9),
    st.integers(0, 2**70),
)
def test_each_bucket_gets_its_share_of_the_steps(
    tokens: list[int], steps: int, odds: str, draw: str, cycles: int, seed: int
):
    chosen = step_buckets(tokens, steps, curriculum(odds, cycles, draw), seed)
    assert chosen.shape == (steps,)
    counts = np.bincount(chosen, minlength=len(tokens)).tolist()
    exact = [Fraction(steps * entry, sum(tokens)) for entry in tokens]
    assert all(abs(count - share) < 1 for count, share in zip(counts, exact, strict=True))
    # Largest remainder: no bucket rounded up has a smaller remainder than one rounded down.
    up = [share % 1 for count, share in zip(counts, exact, strict=True) if count > share]
    down = [share % 1 for count, share in zip(counts, exact, strict=True) if count < share]
    assert not up or not down or min(up) >= max(down)


@pytest.mark.parametrize("odds", ODDS)
@pytest.mark.parametrize("draw", DRAWS)
def test_every_cycle_has_a_near_equal_part_of_every_bucket(odds, draw: str):
    tokens, steps, cycles = [300, 500, 200], 1_000, 8
    chosen = step_buckets(tokens, steps, curriculum(odds, cycles, draw), seed=1)
    parts = [[300 * (j + 1) // 8 - 300 * j // 8, 500 * (j + 1) // 8 - 500 * j // 8, 25] for j in range(cycles)]
    start = 0
    for part in parts:
        assert np.bincount(chosen[start : start + sum(part)], minlength=3).tolist() == part
        start += sum(part)
    assert max(part[0] for part in parts) - min(part[0] for part in parts) <= 1


@pytest.mark.parametrize("odds", PAPER_ODDS, ids=str)
def test_named_odds_are_those_of_the_paper(odds):
    assert list(bucket_odds(curriculum(odds), 3)) == PAPER_ODDS[odds]


def test_odds_for_another_number_of_buckets():
    with pytest.raises(ValueError, match=r"curriculum\.odds = \[5\.0, 1\.0, 2\.5\]: the data has 2 buckets; give one"):
        step_buckets([1, 1], 10, curriculum((5.0, 1.0, 2.5)), 0)


def sequence_probability(order: tuple[int, ...], part: list[int], odds, draw: str) -> float:
    """Return the probability of drawing the buckets in this order from a cycle with `part` batches of each."""
    left, probability = list(part), 1.0
    for bucket in order:
        # Algorithm 1 of the paper uses the odds while any batch is left; its released code multiplies by the batches.
        factors = {"odds": [1] * len(part), "odds_times_batches": part, "odds_times_left": left}[draw]
        if odds == "natural":
            factors = left
        weights = [o * f * (count > 0) for o, f, count in zip(PAPER_ODDS[odds], factors, left, strict=True)]
        probability *= weights[bucket] / sum(weights)
        left[bucket] -= 1
    return probability


@pytest.mark.full
@pytest.mark.parametrize("odds", ODDS, ids=str)
@pytest.mark.parametrize("draw", DRAWS)
def test_whole_orders_appear_as_often_as_the_formula_says(odds, draw: str):
    part, runs = [2, 1, 1], 3_000
    seen = Counter(tuple(step_buckets(part, 4, curriculum(odds, 1, draw), seed).tolist()) for seed in range(runs))
    expected = {
        order: sequence_probability(order, part, odds, draw) for order in set(itertools.permutations([0, 0, 1, 2]))
    }
    assert sum(expected.values()) == pytest.approx(1)
    for order, chance in expected.items():
        assert abs(seen[order] / runs - chance) <= 5 * (chance * (1 - chance) / runs) ** 0.5 + 1e-9, order


def test_buckets_of_unequal_size_end_together_when_left_counts():
    """With equal odds and a draw by odds alone, the small bucket ends after a tenth of the cycle."""
    last = {}
    for draw in DRAWS:
        ends = [
            np.flatnonzero(step_buckets([50, 950], 1_000, curriculum("uniform", 1, draw), seed) == 0)[-1]
            for seed in range(20)
        ]
        last[draw] = np.mean(ends)
    assert last["odds"] < 200
    # The last of 50 random steps of 1,000 is 980 on average. Constant rates keep it near the end, with more spread.
    assert 960 < last["odds_times_left"] < 995
    assert last["odds_times_batches"] > 800


@pytest.mark.parametrize("odds", ["grow_linear", "grow_p2", "grow_p100"])
def test_lengths_grow_within_every_cycle(odds: str):
    lengths = 128 << step_buckets([1, 1, 1, 1, 1], 2_000, curriculum(odds, 4), seed=0).astype(np.int64)
    for cycle in range(4):
        quarters = np.split(lengths[cycle * 500 : (cycle + 1) * 500], 4)
        assert quarters[0].mean() < quarters[-1].mean() / 1.5
        assert (quarters[-1] == 2_048).mean() > (quarters[0] == 2_048).mean()


def test_shrink_p100_is_grow_p100_backwards():
    lengths = step_buckets([1, 1, 1], 300, curriculum("shrink_p100"), seed=0)
    assert [np.median(part) for part in np.split(lengths, 3)] == [2, 1, 0]
    lengths = step_buckets([1, 1, 1], 300, curriculum("grow_p100"), seed=0)
    assert [np.median(part) for part in np.split(lengths, 3)] == [0, 1, 2]


def test_the_same_seed_gives_the_same_buckets_and_cycles_are_not_copies():
    first = step_buckets([5, 5, 5], 300, curriculum(cycles=2), seed=3)
    assert first.tolist() == step_buckets([5, 5, 5], 300, curriculum(cycles=2), seed=3).tolist()
    assert first.tolist() != step_buckets([5, 5, 5], 300, curriculum(cycles=2), seed=4).tolist()
    assert first[:150].tolist() != first[150:].tolist()


def test_a_cycle_does_not_depend_on_the_other_cycles():
    """The first two of four cycles are the same as two cycles of the same size."""
    two, four = (step_buckets([1, 1], steps, curriculum(cycles=steps // 50), 0).tolist() for steps in (100, 200))
    assert two == four[:100]


def test_known_answer():
    """The order is part of the format of a run: neither numpy nor this project may change it unnoticed."""
    assert step_buckets([1, 2, 3], 12, curriculum(cycles=2), 0).tolist() == [2, 2, 1, 0, 1, 2, 2, 2, 1, 1, 0, 2]


@given(st.floats(2.0**-53, 1.0))
def test_exact_log_is_the_logarithm(value: float):
    [found] = exact_log(np.array([value]))
    assert found == pytest.approx(math.log(value), rel=4e-15, abs=1e-300)


@pytest.mark.parametrize(("tokens", "steps"), [([0, 0], 5), ([1], 0)])
def test_steps_or_tokens_that_are_missing(tokens: list[int], steps: int):
    advice = "give at least 1 step and 1 token"
    with pytest.raises(ValueError, match=f"{steps} steps among {sum(tokens)} tokens; {advice}"):
        step_buckets(tokens, steps, curriculum(), 0)
    least = [max(1, tokens[0]), *tokens[1:]]
    assert step_buckets(least, max(1, steps), curriculum(), 0).tolist() == [0] * max(1, steps)
