"""The keyed permutation: a bijection of any range, uniform, and with images that do not depend on other requests."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from longring.data.permutation import permute


@given(st.integers(1, 3_000), st.tuples(st.integers(0, 2**40), st.integers(0, 9)))
def test_is_a_bijection(size: int, key: tuple[int, int]):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 255, 256, 257, 4_096, 4_097, 65_536, 100_003])
def test_is_a_bijection_at_edges_of_the_domain(size: int):
    images = permute(np.arange(size), size, (1, 2, 3))
    assert images.dtype == np.int64
    assert sorted(images.tolist()) == list(range(size))


def test_an_index_alone_has_the_image_it_has_among_all():
    every = permute(np.arange(1_000), 1_000, (5,))
    assert [int(permute(index, 1_000, (5,))) for index in range(1_000)] == every.tolist()
    assert permute(np.arange(12).reshape(3, 4), 1_000, (5,)).tolist() == every[:12].reshape(3, 4).tolist()


def test_a_huge_range_costs_only_the_requested_indices():
    images = permute(np.arange(10_000), 2**40, (0,))
    assert len(np.unique(images)) == 10_000
    assert images.max() < 2**40
    # The mean of 10,000 uniform values: 0.5 with standard deviation 0.003.
    assert abs(images.mean() / 2**40 - 0.5) < 0.015


def test_keys_that_could_be_confused_give_different_orders():
    keys = [(1,), (1, 0), (0, 1), (2**32,), (12, 3), (1, 23), (123,)]
    orders = {tuple(permute(np.arange(50), 50, key).tolist()) for key in keys}
    assert len(orders) == len(keys)


@pytest.mark.parametrize("size", [5, 10, 64])
def test_each_item_takes_each_position_equally_often(size: int):
    keys = 1_500
    orders = np.stack([permute(np.arange(size), size, (9, key)) for key in range(keys)])
    for item in (0, 1, size // 2, size - 1):
        counts = np.bincount(orders[:, item], minlength=size)
        chi_square = ((counts - keys / size) ** 2 / (keys / size)).sum()
        degrees = size - 1
        # Five standard deviations of the chi-square distribution above its mean.
        assert chi_square < degrees + 5 * (2 * degrees) ** 0.5, (item, counts)


def test_all_orders_of_four_appear_about_equally_often():
    keys = 2_400
    orders = [tuple(permute(np.arange(4), 4, (key,)).tolist()) for key in range(keys)]
    counts = np.array([orders.count(order) for order in permutations(range(4))])
    chi_square = ((counts - keys / 24) ** 2 / (keys / 24)).sum()
    assert chi_square < 23 + 5 * 46**0.5, counts


def test_neighbours_do_not_stay_neighbours():
    images = permute(np.arange(10_000), 10_000, (3,))
    # A random order has 2 expected pairs of successors still adjacent; a weak round function has thousands.
    assert np.count_nonzero(np.abs(np.diff(images)) == 1) < 15


@pytest.mark.parametrize("size", [0, -1, 2**40 + 1])
def test_size_out_of_range(size: int):
    with pytest.raises(ValueError, match=str(size)):
        permute([0], size, (0,))


@pytest.mark.parametrize("index", [-1, 10])
def test_index_out_of_range(index: int):
    with pytest.raises(IndexError, match=r"\[0, 10\)"):
        permute([index], 10, (0,))
