"""Parameters on disk, divided in any way, as the ranges of them that a rank holds.

A parameter is treated as a matrix (a vector as one column). A tensor-parallel slice holds some rows or some columns of
the matrix, and a range is part of a flattened slice. A fragment covers rows of its own slice, so it needs one range of
elements from every stored slice that has some of these rows. They are read some rows at a time: beside the fragment, a
rank holds two of these matrices.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...parallel.parameters import Cut, Fragment, Parameter
from .format import ParameterEntry

READ_ELEMENTS = 1 << 22
"""Number of elements that are read at once, rounded to whole rows."""


class Stored(Protocol):
    """Whole parameters on disk, as flattened slices of which any range can be read."""

    name: str
    """Name in errors."""
    parameters: Mapping[str, ParameterEntry]
    """Entry of every parameter, by name."""
    tensor: int
    """Number of slices of a parameter that is cut."""

    def read(self, result: Tensor, parameter: str, kind: str, slice_number: int, first: int) -> None:
        """Read elements of a flattened slice from `first` on into `result`, fp32 [numel] on the host.

        Raises ValueError if they are not there or damaged, and OSError if they cannot be read.
        """
        ...


def read_whole(stored: Stored, name: str, kind: str = "weight") -> Tensor:
    """Return a whole parameter, or another of its tensors, in fp32 and in the parameter's shape.

    Raises KeyError if there is no such parameter, and what `Stored.read` raises.
    """
    shape = stored.parameters[name].shape
    whole = torch.empty(shape)
    fill(stored, Fragment(Parameter(name, shape, None), 0, {kind: whole.view(-1)}), (kind,), 0, 1)
    return whole


def fill(stored: Stored, fragment: Fragment, kinds: Collection[str], tensor_rank: int, tensor_size: int) -> None:
    """Copy the tensors of these kinds of a fragment into its views.

    Raises ValueError if there is no parameter of this name and shape, or part of it is missing.
    """
    parameter = fragment.parameter
    entry = stored.parameters.get(parameter.name)
    if entry is None or entry.shape != parameter.shape:
        raise ValueError(
            f"{stored.name}: is of another model: {parameter.name} has shape {list(entry.shape) if entry else 'none'} "
            f"there and {list(parameter.shape)} here; bring back the old `model` settings, or name another "
            "run_directory"
        )
    # Rows and columns of this rank's slice, as ranges of the whole parameter; `width` is the length of a row of the
    # slice.
    rows, columns = (_spans(parameter.shape, dim, parameter.cut, tensor_rank, tensor_size) for dim in (0, 1))
    width, stop = sum(map(len, columns)), fragment.start + fragment.numel
    at_once = max(1, READ_ELEMENTS // width)  # rows
    for kind in kinds:
        view = fragment.tensors[kind]  # [numel]
        # Rows of this rank's slice; the fragment may begin and end within a row.
        for first in range(fragment.start // width, -(-stop // width), at_once):
            wanted = list(_part(rows, first, min(first + at_once, -(-stop // width))))
            matrix = _read_matrix(stored, parameter.name, entry, kind, wanted, columns).view(-1)  # [rows x width]
            begin, end = max(first * width, fragment.start), min(first * width + len(matrix), stop)  # in the slice
            view[begin - fragment.start : end - fragment.start].copy_(
                matrix[begin - first * width : end - first * width]
            )


def _read_matrix(
    stored: Stored, name: str, entry: ParameterEntry, kind: str, rows: Sequence[range], columns: Sequence[range]
) -> Tensor:
    """Return these rows and columns of a whole parameter, fp32 [rows, columns], from the slices that have them."""
    matrix = torch.empty(sum(map(len, rows)), sum(map(len, columns)))
    cut = entry.cut and Cut(*entry.cut)
    num_read = 0
    for number in range(stored.tensor if cut else 1):
        # The mesh that saved may have cut the parameter along another dim, or into another number of slices.
        their_rows, their_columns = (_spans(entry.shape, dim, cut, number, stored.tensor) for dim in (0, 1))
        width = sum(map(len, their_columns))
        for at, their_at, count in _overlaps(rows, their_rows):
            there = torch.empty(count, width)  # whole rows of their slice: one range of it
            stored.read(there.view(-1), name, kind, number, their_at * width)
            for left, their_left, breadth in _overlaps(columns, their_columns):
                matrix[at : at + count, left : left + breadth] = there[:, their_left : their_left + breadth]
                num_read += count * breadth
    assert num_read == matrix.numel(), "the slices make up the whole parameter"
    return matrix


def _spans(shape: tuple[int, ...], dim: int, cut: Cut | None, tensor_rank: int, tensor_size: int) -> list[range]:
    """Return the rows (dim 0) or columns (1) of the whole parameter that a slice holds, in the order of the slice."""
    size = (shape[0], math.prod(shape[1:]))[dim]
    if cut is None or cut.dim != dim:
        return [range(size)]
    # A fused weight has `stride` parts, such as gate and up, and every rank holds its share of each.
    part = size // (cut.stride * tensor_size)  # rows or columns of one part on one rank
    return [
        range(part * number, part * (number + 1))
        for number in range(tensor_rank, cut.stride * tensor_size, tensor_size)
    ]


def _part(spans: Sequence[range], first: int, stop: int) -> Iterator[range]:
    """Yield elements [first, stop) of spans that follow one another."""
    at = 0  # elements of the spans before this one
    for span in spans:
        if found := span[max(0, first - at) : max(0, stop - at)]:
            yield found
        at += len(span)


def _overlaps(ours: Sequence[range], theirs: Sequence[range]) -> Iterator[tuple[int, int, int]]:
    """Yield (index into ours, index into theirs, number) of adjacent elements that both have."""
    at = 0  # elements of ours before `mine`
    for mine in ours:
        their_at = 0  # elements of theirs before `span`
        for span in theirs:
            first, stop = max(mine.start, span.start), min(mine.stop, span.stop)
            if first < stop:
                yield at + first - mine.start, their_at + first - span.start, stop - first
            their_at += len(span)
        at += len(mine)
