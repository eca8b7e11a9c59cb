import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from longring.data.curriculum import schedule

ODDS = ["uniform", "natural", "grow_linear", "grow_p2"]
PAPER_ODDS = {"uniform": [1, 1, 1, 1], "grow_linear": [4, 3, 2, 1], "grow_p2": [8, 4, 2, 1]}


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 10**12), min_size=1, max_size=8).filter(any),
    st.integers(1, 300),
    st.sampled_from(ODDS),
    st.integers(1, 9),
    st.integers(0, 2**70),
)
def test_each_bucket_gets_its_share_of_the_steps(tokens: list[int], steps: int, odds: str, cycles: int, seed: int):
    chosen = schedule(tokens, steps, odds, cycles, seed)
    assert chosen.shape == (steps,)
    counts = np.bincount(chosen, minlength=len(tokens)).tolist()
    exact = [Fraction(steps * entry, sum(tokens)) for entry in tokens]
    assert all(abs(count - share) < 1 for count, share in zip(counts, exact, strict=True))
    # Largest remainder: no bucket rounded up has a smaller remainder than one rounded down.
    up = [share % 1 for count, share in zip(counts, exact, strict=True) if count > share]
    down = [share % 1 for count, share in zip(counts, exact, strict=True) if count < share]
    assert not up or not down or min(up) >= max(down)


@pytest.mark.parametrize("odds", ODDS)
def test_every_cycle_has_a_near_equal_part_of_every_bucket(odds: str):
    tokens, steps, cycles = [300, 500, 200], 1_000, 8
    chosen = schedule(tokens, steps, odds, cycles, seed=1)
    parts = [[300 * (j + 1) // 8 - 300 * j // 8, 500 * (j + 1) // 8 - 500 * j // 8, 25] for j in range(cycles)]
    start = 0
    for part in parts:
        assert np.bincount(chosen[start : start + sum(part)], minlength=3).tolist() == part
        start += sum(part)
    assert max(part[0] for part in parts) - min(part[0] for part in parts) <= 1


@pytest.mark.parametrize("odds", PAPER_ODDS)
def test_first_draws_follow_the_odds(odds: str):
    runs = 4_000
    firsts = Counter(int(schedule([1, 1, 1, 1], 40, odds, 1, seed)[0]) for seed in range(runs))
    weights = PAPER_ODDS[odds]
    for bucket, weight in enumerate(weights):
        chance = weight / sum(weights)
        assert abs(firsts[bucket] / runs - chance) < 5 * (chance * (1 - chance) / runs) ** 0.5


def sequence_probability(order: tuple[int, ...], part: list[int], weights: list[int]) -> float:
    """Algorithm 1's probability of drawing the buckets in this order from a cycle with `part` batches of each."""
    left, probability = list(part), 1.0
    for bucket in order:
        total = sum(weight for weight, count in zip(weights, left, strict=True) if count)
        probability *= weights[bucket] / total if left[bucket] else 0
        left[bucket] -= 1
    return probability


@pytest.mark.parametrize("odds", ODDS)
def test_whole_orders_appear_as_often_as_the_formula_says(odds: str):
    part, runs = [2, 1, 1], 4_000
    seen = Counter(tuple(schedule(part, 4, odds, 1, seed).tolist()) for seed in range(runs))
    orders = set(itertools.permutations([0, 0, 1, 2]))
    expected = {
        order: 1 / len(orders)  # "natural" is a plain shuffle
        if odds == "natural"
        else sequence_probability(
            order, part, {"uniform": [1, 1, 1], "grow_linear": [3, 2, 1], "grow_p2": [4, 2, 1]}[odds]
        )
        for order in orders
    }
    assert sum(expected.values()) == pytest.approx(1)
    for order, chance in expected.items():
        assert abs(seen[order] / runs - chance) < 5 * (chance * (1 - chance) / runs) ** 0.5, order


@pytest.mark.parametrize("odds", ["grow_linear", "grow_p2"])
def test_lengths_grow_within_every_cycle(odds: str):
    lengths = 128 << schedule([1, 1, 1, 1, 1], 2_000, odds, 4, seed=0)
    for cycle in range(4):
        quarters = np.split(lengths[cycle * 500 : (cycle + 1) * 500], 4)
        assert quarters[0].mean() < quarters[-1].mean() / 2
        assert quarters[-1][-10:].tolist() == [2_048] * 10


def test_same_seed_same_schedule_and_cycles_are_not_copies():
    first = schedule([5, 5, 5], 300, "grow_p2", 2, seed=3)
    assert first.tolist() == schedule([5, 5, 5], 300, "grow_p2", 2, seed=3).tolist()
    assert first.tolist() != schedule([5, 5, 5], 300, "grow_p2", 2, seed=4).tolist()
    assert first[:150].tolist() != first[150:].tolist()


def test_a_cycle_draws_the_same_whatever_the_others_drew():
    """Two cycles against four of the same size: the first two agree."""
    assert schedule([1, 1], 100, "grow_p2", 2, 0).tolist() == schedule([1, 1], 200, "grow_p2", 4, 0)[:100].tolist()


def test_known_answer():
    """The order is part of the format of a run: numpy or we may not change it unnoticed."""
    assert schedule([1, 2, 3], 12, "grow_p2", 2, 0).tolist() == [1, 0, 1, 2, 2, 2, 1, 0, 1, 2, 2, 2]


@pytest.mark.parametrize(("tokens", "steps", "cycles"), [([0, 0], 5, 1), ([1], 0, 1), ([1], 5, 0)])
def test_nothing_to_schedule(tokens: list[int], steps: int, cycles: int):
    with pytest.raises(ValueError, match=f"{steps} steps in {cycles} cycles over {sum(tokens)} tokens"):
        schedule(tokens, steps, "uniform", cycles, 0)
