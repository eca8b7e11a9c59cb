"""The keyed permutation: a bijection of any range, with images that do not depend on other requests."""

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


@pytest.mark.parametrize("size", [0, -1, 2**40 + 1])
def test_size_out_of_range(size: int):
    with pytest.raises(ValueError, match=rf"size = {size}: .*; leave out an empty range, and divide a larger one"):
        permute([0], size, (0,))
    if size > 0:
        permute([0], size // 2, (0,))


@pytest.mark.parametrize("index", [-1, 10])
def test_index_out_of_range(index: int):
    with pytest.raises(IndexError, match=r"\[0, 10\); leave out those outside, or give the size of their range"):
        permute([3, index], 10, (0,))
    assert len(permute([3], 10, (0,))) == 1
    if index > 0:
        assert len(permute([3, index], index + 1, (0,))) == 2
