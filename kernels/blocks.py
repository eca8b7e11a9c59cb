"""Block sizes of the Triton kernels, by device: `tuned.json`, which `benchmarks/tune_attention.py` writes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class Blocks(NamedTuple):
    """How a kernel is cut: rows of queries and of keys in a block, warps of a program, depth of its pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def blocks(kernel: str, q: Tensor) -> Blocks:
    """What `kernel` runs with on q's device, for q's element size and head dim."""
    return tuned(kernel, architecture(q.device), q.itemsize, q.shape[-1])


def architecture(device: torch.device) -> str:
    """The name of a device's entry in `tuned.json`; "interpreter" for a CPU."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def tuned(kernel: str, arch: str, element_bytes: int, head_dim: int) -> Blocks:
    """The same by name of the architecture."""
    if arch == "interpreter":
        return Blocks(32, 16, 1, 1)  # small, so that small shapes have several; unequal, so that none is mistaken
    table = tuned_table()
    # An unknown device takes what suits the smallest shared memory of NVIDIA's.
    entries = table.get(arch, table["sm_80"])[kernel][f"{8 * element_bytes} bit"]
    widest = min(width for width in map(int, entries) if head_dim <= width)
    return Blocks(*entries[str(widest)])


@cache
def tuned_table() -> dict[str, dict[str, dict[str, dict[str, list[int]]]]]:
    """architecture -> kernel -> "16 bit" or "32 bit" -> largest head dim -> Blocks."""
    return json.loads(Path(__file__).with_name("tuned.json").read_text())
