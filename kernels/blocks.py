"""Block sizes of the Triton kernels by device, from `tuned.json`, which `benchmarks/tune_attention.py` writes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class Blocks(NamedTuple):
    """The launch configuration of a kernel: query and key rows per block, warps per program, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def blocks(kernel: str, q: Tensor) -> Blocks:
    """Return the configuration of `kernel` for the device, element size and head dim of q `[b, s, h, d]`."""
    return tuned(kernel, architecture(q.device), q.itemsize, q.shape[-1])


@cache
def architecture(device: torch.device) -> str:
    """Return the name under which `tuned.json` lists a device, for example "sm_90"; "interpreter" for a CPU."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def tuned(kernel: str, arch: str, element_bytes: int, head_dim: int) -> Blocks:
    """Return the configuration of `kernel` on an architecture that `architecture` names, or on "interpreter"."""
    if arch == "interpreter":
        # Small, so that small test shapes span several blocks; unequal, so that swapped block dims show in tests.
        return Blocks(32, 16, 1, 1)
    table = tuned_table()
    # A device without an entry takes that of sm_80, whose blocks fit into the smallest shared memory listed.
    entries = table.get(arch, table["sm_80"])[kernel][f"{8 * element_bytes} bit"]
    # Entries are keyed by the largest head dim they serve: take the smallest that holds this one.
    width = min(width for width in map(int, entries) if head_dim <= width)
    return Blocks(*entries[str(width)])


@cache
def tuned_table() -> dict[str, dict[str, dict[str, dict[str, list[int]]]]]:
    """Return `tuned.json`: architecture -> kernel -> "16 bit" or "32 bit" -> largest head dim -> fields of `Blocks`."""
    return json.loads(Path(__file__).with_name("tuned.json").read_text())
