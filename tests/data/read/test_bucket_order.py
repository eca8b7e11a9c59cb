"""The stream of one bucket against brute force: its sources' shares at every position, and whole passes of each."""

from bisect import bisect_right

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from longring.data.read.bucket_order import POSITIONS_AT_ONCE, BucketOrder, Knot, SourcePart
from longring.data.read.shares import WEIGHT_SUM, integer_weights


def parts_of(sizes: list[int], shard: int = 3, window: int = 0) -> list[SourcePart]:
    """Return parts of these numbers of sequences, in shards of `shard` sequences."""
    parts, first = [], 0
    for number, size in enumerate(sizes):
        shards = tuple([shard] * (size // shard) + [size % shard] * (size % shard > 0))
        one = window if window < size else 0
        parts.append(SourcePart(source=f"s{number}", first_sequence=first, shard_sequences=shards, window=one))
        first += size
    return parts


def natural(sizes: list[int], window: int = 0, seed: int = 0) -> BucketOrder:
    return BucketOrder(parts_of(sizes, window=window), [Knot(0, integer_weights(sizes))], (seed, 8))


def sources_by_time(order: list[Knot], count: int) -> list[int]:
    """Return the source at each of `count` positions: at each time, each source whose due has reached k + 1/2.

    A mix counts when every position before its own has been given, however late that is for S sources.
    """
    num_sources = len(order[0].weights)
    order = [order[0], *(Knot(knot.position + num_sources // 2 + 1, knot.weights) for knot in order[1:])]
    due, given, found = [0] * num_sources, [0] * num_sources, []  # in parts of WEIGHT_SUM
    time = 0
    while len(found) < count:
        knot = order[bisect_right([knot.position for knot in order], time) - 1]
        time += 1
        for source, weight in enumerate(knot.weights):
            due[source] += weight
            if 2 * due[source] >= (2 * given[source] + 1) * WEIGHT_SUM:
                given[source] += 1
                found.append(source)
    return found[:count]


@st.composite
def mixes(draw: st.DrawFn) -> tuple[list[int], list[Knot]]:
    """Return sizes of sources and mixes by position, in which each source with a weight has sequences."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    begins = sorted({0, *draw(st.lists(st.integers(0, 300), max_size=4))})
    share = st.lists(st.sampled_from([0, 1, 2, 3, 1000]), min_size=len(sizes), max_size=len(sizes)).filter(any)
    return sizes, [Knot(begin, integer_weights(draw(share))) for begin in begins]


@pytest.mark.full
@settings(max_examples=60)
@given(mixes(), st.integers(0, 400), st.integers(0, 8))
def test_every_position_against_brute_force_and_the_bound(mix, first: int, window: int):
    sizes, knots = mix
    order = BucketOrder(parts_of(sizes, window=window), knots, (0, 8))
    owners = np.repeat(np.arange(len(sizes)), sizes)
    found = order.at(np.arange(first, first + 60))
    assert owners[found].tolist() == sources_by_time(knots, first + 60)[first:], "the sources are those of brute force"
    due = [0] * len(sizes)
    whole = owners[order.at(np.arange(first + 60))]
    margin = len(sizes) + 2
    for position in range(first + 60):
        near = [knot.weights for knot in knots if knot.position <= position]
        last = max(index for index, knot in enumerate(knots) if knot.position <= position)
        due = [d + w for d, w in zip(due, knots[last].weights, strict=True)]
        largest = [max(column) for column in zip(*near, strict=True)]
        given_here = np.bincount(whole[: position + 1], minlength=len(sizes)).tolist()
        if position in (0, first, first + 59):
            assert order.given(position + 1).tolist() == given_here
        for count, d, w in zip(given_here, due, largest, strict=True):
            assert abs(count - d / WEIGHT_SUM) <= 0.5 + w / WEIGHT_SUM * margin
    for number, knot in enumerate(knots[1:], 1):
        shorter, before = BucketOrder(parts_of(sizes, window=window), knots[:number], (0, 8)), np.arange(knot.position)
        assert shorter.at(before).tolist() == order.at(before).tolist(), "no position depends on a later mix"
    # Each source's own stream goes through all of its sequences before one comes again.
    for source, size in enumerate(sizes):
        stream = order.at(np.arange(first + 60))[whole == source]
        for start in range(0, len(stream), size):
            assert len(set(stream[start : start + size].tolist())) == len(stream[start : start + size])


@pytest.mark.parametrize("window", [0, 4, 50])
@pytest.mark.parametrize("sizes", [[17], [300, 50, 7], [4100, 900]])
def test_with_natural_shares_every_sequence_comes_once_in_every_pass(sizes: list[int], window: int):
    order, size = natural(sizes, window), sum(sizes)
    passes = [order.at(np.arange(p * size, (p + 1) * size)).tolist() for p in (0, 1, 2, 10**6)]
    assert all(sorted(one) == list(range(size)) for one in passes)
    assert len({tuple(one) for one in passes}) == 4, "each pass has its own order"
    assert passes[0] != natural(sizes, window, seed=1).at(np.arange(size)).tolist(), "and each seed"


def test_once_in_a_pass_of_many_sequences():
    """Rounded weights move no sequence into another pass in 2^42 positions."""
    sizes = [2**39 + 12_345, 2**38 + 1, 977]
    order, size = natural([1]), sum(sizes)
    order = BucketOrder(
        [SourcePart(source=str(n), first_sequence=0, shard_sequences=(n,)) for n in sizes],
        [Knot(0, integer_weights(sizes))],
        (0, 8),
    )
    for passes in (1, 3, 5):
        assert order.given(passes * size).tolist() == [passes * n for n in sizes]


def test_sources_lie_evenly():
    """A source has its share of every run of positions, up to one sequence."""
    is_a = natural([300, 700]).at(np.arange(1_000)) < 300
    for start in range(0, 1_000, 50):
        assert abs(is_a[start : start + 50].sum() - 15) <= 1


def test_a_shuffle_window_reads_few_shards():
    [part] = parts_of([500], shard=10, window=20)
    numbers = BucketOrder([part], [Knot(0, (WEIGHT_SUM,))], (0, 8)).at(np.arange(500)) // 10
    assert max(len(set(numbers[start : start + 20])) for start in range(0, 500, 20)) == 2
    assert numbers[::10].tolist() != sorted(numbers[::10].tolist()), "shards come in an order of their own"
    [part] = parts_of([500], shard=10)
    assert len(set(BucketOrder([part], [Knot(0, (WEIGHT_SUM,))], (0, 8)).at(np.arange(20)) // 10)) > 10


@pytest.mark.parametrize("change_at", [100, 5_000])
def test_a_later_change_of_the_mix_leaves_the_positions_before_it(change_at: int):
    half, other = integer_weights([1, 1]), integer_weights([3, 1])
    parts = parts_of([50, 60])
    before, now = (BucketOrder(parts, [Knot(0, half), *more], (0, 8)) for more in ([], [Knot(change_at, other)]))
    equal = before.equal_positions(now)
    assert equal is not None
    assert equal == change_at
    assert before.at(np.arange(equal)).tolist() == now.at(np.arange(equal)).tolist()
    assert before.at(np.arange(change_at + 20)).tolist() != now.at(np.arange(change_at + 20)).tolist()
    same = BucketOrder(parts, [Knot(0, half), Knot(7, half), Knot(9, other), Knot(9, half)], (0, 8))
    assert before.equal_positions(same) is None
    assert before.equal_positions(BucketOrder(parts, [Knot(0, half)], (1, 8))) == 0
    # A range of positions that straddles the change is computed as a whole.
    assert change_at > POSITIONS_AT_ONCE or equal < POSITIONS_AT_ONCE


def test_known_answer():
    """The order is part of the format of a run: it stays for ever."""
    knots = [Knot(0, integer_weights([1, 2, 1])), Knot(20, integer_weights([1, 0, 3]))]
    windowed, whole = (BucketOrder(parts_of([14, 40, 8], window=window), knots, (3, 16)) for window in (5, 0))
    assert windowed.at(np.arange(12)).tolist() == [45, 7, 56, 34, 46, 6, 55, 32, 44, 5, 54, 33]
    assert windowed.at(np.arange(10_000, 10_012)).tolist() == [55, 7, 60, 61, 54, 6, 57, 58, 59, 8, 61, 60]
    assert whole.at(np.arange(12)).tolist() == [38, 10, 61, 47, 14, 1, 59, 34, 53, 5, 54, 42]
