"""Attention's inputs: the properties that decide which backends can compute them, and their layout in memory."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["whole", "causal", "window", "documents"]
"""The kind of a tile's mask: every query sees every key; one causal run of keys; one run with an attention window; or
several runs beside each other, as of packed documents or of windows cut by chunks."""
Task = Literal["forward", "continued", "backward"]
"""Task of a kernel: a result from nothing, a result added to a running one, or gradients."""


class Case(NamedTuple):
    """The properties of the inputs that decide which backends can compute them."""

    device: str
    """Device type, as torch names it."""
    arch: str
    """Architecture, as `blocks.architecture` names it."""
    dtype: torch.dtype
    head_dim: int
    num_kv_heads: int
    softcap: bool
    deterministic: bool = False
    """Whether torch is asked for deterministic algorithms, so that a backward must sum in a fixed order."""

    def __str__(self) -> str:
        softcap = ", softcap" if self.softcap else ""
        return f"{str(self.dtype).removeprefix('torch.')} on {self.device}, head dim {self.head_dim}{softcap}"


def unfit_nvidia(case: Case, least: int, largest_head_dim: int, softcap: bool = False) -> str | None:
    """Return why a 16-bit kernel for NVIDIA GPUs cannot compute a case, or None.

    `least` is the lowest compute capability that has the kernel, times 10; `softcap` says whether it supports one.
    """
    if case.device != "cuda":
        return "runs on CUDA"
    if not case.arch.startswith("sm_"):
        return f"runs on NVIDIA GPUs, not on {case.arch}"
    if int(case.arch.removeprefix("sm_")) < least:
        return f"runs on sm_{least} and later, not on {case.arch}"
    if case.dtype not in (torch.bfloat16, torch.float16):
        return "bfloat16 and float16 only"
    if case.softcap and not softcap:
        return "no softcap"
    if case.head_dim > largest_head_dim or case.head_dim % 8:
        return f"head dims up to {largest_head_dim}, multiples of 8"
    return None


def addressable(x: Tensor) -> Tensor:
    """Return x `[..., d]`, copied if a TMA descriptor cannot address it.

    A descriptor needs a contiguous last dim, and a base address and other strides that are multiples of 16 bytes; the
    kernels of LongRing and of packages are compiled for such addresses.
    """
    *steps, last = x.stride()
    bits = 0  # of all strides together: a power of two divides each of them if it divides this
    for step in steps:
        bits |= step
    if last == 1 and not (x.data_ptr() | bits * x.itemsize) % 16:
        return x
    return x.clone(memory_format=torch.contiguous_format)
