"""Parameters, and fragments of them, as checkpoints name them: no process group and no optimizer is needed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""Tensors of a fragment: the fp32 value of the parameter, AdamW's first moment, AdamW's second moment."""


@dataclass(frozen=True)
class Cut:
    """Division of a parameter's rows or columns by tensor parallelism.

    `dim` is cut into stride x ranks parts; rank k holds parts k, k + ranks, ... Stride 2 is a matrix that holds gate
    and up one after the other.
    """

    dim: int
    stride: int


@dataclass(frozen=True)
class Parameter:
    """A whole parameter of the model, before any division."""

    name: str
    shape: tuple[int, ...]
    cut: Cut | None
    """Division over the tensor-parallel ranks; None if every one of them holds the whole parameter."""


@dataclass(frozen=True)
class Fragment:
    """Range of a parameter's flattened tensor-parallel slice: elements [start, start + numel)."""

    parameter: Parameter
    start: int
    tensors: dict[str, Tensor]
    """Views of the optimizer's fp32 buffers by kind (`KINDS`), each `[numel]`."""

    @property
    def numel(self) -> int:
        """Number of elements of the range."""
        return self.tensors["weight"].numel()

    def narrowed(self, start: int, numel: int) -> Fragment:
        """Return the sub-range of `numel` elements from `start`, counted from the start of this fragment."""
        tensors = {kind: tensor[start : start + numel] for kind, tensor in self.tensors.items()}
        return Fragment(self.parameter, self.start + start, tensors)
