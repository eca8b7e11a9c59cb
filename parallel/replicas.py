"""Replicas: whether the ranks that hold the same tensors still hold the same bits.

Ranks of one tensor-parallel slice hold equal weights until ZeRO 3 divides them, and under ZeRO 0 equal optimizer state
too. A rank whose memory or processor errs drifts away from the others, and nothing else shows it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from .fragments import held
from .mesh import Mesh

_FACTOR = 0x5851F42D4C957F2D
"""Odd, so that multiplying by it loses no bit of 64."""


def drifted_ranks(engine: DeepSpeedEngine, mesh: Mesh) -> list[int]:
    """Return the ranks whose replicated tensors differ from those of most of their replicas, on every rank. Collective.

    Without a majority all ranks of the slice are returned. One flipped bit always counts.
    """
    mine = torch.zeros((), dtype=torch.int64, device=mesh.device)
    for tensor in _replicated(engine, mesh):
        mine = sum_of_bits(tensor, mine)
    sums = torch.empty(mesh.world_size, dtype=torch.int64, device=mesh.device)
    dist.all_gather_into_tensor(sums, mine.view(1))
    found: list[int] = []
    # A slice is on every tensor_size-th rank.
    for first in range(mesh.tensor_size):
        replicas = range(first, mesh.world_size, mesh.tensor_size)
        values = sums[first :: mesh.tensor_size].tolist()
        [most] = sorted(set(values), key=values.count)[-1:]
        clear = 2 * values.count(most) > len(values)
        found += [rank for rank, value in zip(replicas, values, strict=True) if value != most or not clear]
    return sorted(found)


def _replicated(engine: DeepSpeedEngine, mesh: Mesh) -> Iterator[Tensor]:
    """Yield every tensor that this rank holds in full, like all other ranks of its tensor-parallel slice."""
    stage = engine.zero_optimization_stage()
    if stage < 3:
        yield from (parameter.detach() for parameter in engine.parameters())
    if stage == 0:
        yield from (tensor for fragment in held(engine, mesh) for tensor in fragment.tensors.values())


def sum_of_bits(tensor: Tensor, before: Tensor) -> Tensor:
    """Return `before` x an odd number + the sum of a tensor's memory in words of 64 bits, modulo 2^64; int64 []."""
    memory = tensor.detach().reshape(-1).view(torch.uint8)
    # Aligned words are summed as they lie, without a copy; the bytes before and after them are added singly.
    first = -memory.storage_offset() % 8
    last = first + max(0, memory.numel() - first) // 8 * 8
    if first == last:
        return before * _FACTOR + memory.sum(dtype=torch.int64)
    ends = torch.cat([memory[:first], memory[last:]]).sum(dtype=torch.int64)
    return before * _FACTOR + memory[first:last].view(torch.int64).sum() + ends
