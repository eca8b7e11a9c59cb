"""Any part of a parameter that was saved in any division: against numpy's own cutting of the whole."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from longring.launch.checkpoint import stored
from longring.launch.checkpoint.format import ParameterEntry
from longring.launch.checkpoint.stored import fill
from longring.parallel.fragments import Cut, Fragment, Parameter
from numpy.typing import NDArray
from torch import Tensor


def slice_of(whole: NDArray[np.float32], cut: Cut | None, rank: int, size: int) -> NDArray[np.float32]:
    """Return the slice of a tensor-parallel rank: parts rank, rank + size, ... of the cut dim."""
    if cut is None:
        return whole
    parts = np.split(whole, cut.stride * size, axis=cut.dim)
    return np.concatenate(parts[rank::size], axis=cut.dim)


class Slices:
    """Slices of one parameter in memory, `Stored`."""

    name = "slices"

    def __init__(self, whole: NDArray[np.float32], cut: Cut | None, size: int) -> None:
        entry = ParameterEntry(shape=whole.shape, cut=cut and (cut.dim, cut.stride))
        self.parameters: Mapping[str, ParameterEntry] = {"w": entry}
        self.tensor = size
        self.largest = 0
        self._slices = [slice_of(whole, cut, rank, size).reshape(-1) for rank in range(size if cut else 1)]

    def read(self, result: Tensor, parameter: str, kind: str, slice_number: int, first: int) -> None:
        self.largest = max(self.largest, result.numel())
        found = self._slices[slice_number][first : first + result.numel()]
        result.copy_(torch.from_numpy(found))


@given(data=st.data())
def test_a_fragment_is_filled_from_any_division(data):
    rows, columns = (12 * data.draw(st.integers(1, 3)) for _ in range(2))
    shape = (rows, columns) if data.draw(st.booleans()) else (rows,)
    whole = np.random.default_rng(0).random(shape, dtype=np.float32)
    cuts = st.sampled_from([None, *(Cut(dim, stride) for dim in range(len(shape)) for stride in (1, 2, 3))])
    saved, mine, saved_size, size = data.draw(st.tuples(cuts, cuts, st.sampled_from([1, 2]), st.sampled_from([1, 2])))
    rank = data.draw(st.integers(0, size - 1)) if mine else 0
    expected = slice_of(whole, mine, rank, size).reshape(-1)
    start = data.draw(st.integers(0, expected.size - 1))
    numel = data.draw(st.integers(1, expected.size - start))
    view = torch.full((numel,), math.nan)
    slices = Slices(whole, saved, saved_size)
    stored.READ_ELEMENTS, before = data.draw(st.integers(1, 500)), stored.READ_ELEMENTS
    try:
        fill(slices, Fragment(Parameter("w", shape, mine), start, {"weight": view}), ["weight"], rank, size)
        # Rows of the slice that was saved may be longer than ours.
        assert slices.largest <= max(stored.READ_ELEMENTS * columns, columns)
    finally:
        stored.READ_ELEMENTS = before
    np.testing.assert_array_equal(view.numpy(), expected[start : start + numel])
