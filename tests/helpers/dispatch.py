"""Modes that watch the operators of a computation: the largest tensor that it makes, and how often each is called."""

from __future__ import annotations

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """A mode that records the element count of the largest tensor that any operator returns, also in a backward."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


class Operators(TorchDispatchMode):
    """A mode that counts the calls of each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))

    def number(self, name: str) -> int:
        return self.calls.count(name)
