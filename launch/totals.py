"""Sums over all ranks that a training step needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.read.loader import MicroBatch
from ..parallel.mesh import Mesh
from .build import BucketLayout
from .checkpoint.save import Status


class Totals(NamedTuple):
    """Sums over the ranks at the end of a step, equal on all of them."""

    attention_flops: float
    """FLOPs of attention, forward and backward."""
    loss_sums: tuple[float, ...]
    """Sum of the losses of all trained targets of each bucket, in nats."""
    num_stopped: int
    """Ranks that have received a signal."""
    num_written: int
    """Ranks that have written their part of the save in flight."""
    num_failed: int
    """Ranks that have failed to write it."""
    compilations: int
    """Kernels that the ranks have compiled since their last step."""


def sum_over_ranks(
    loss_sums: Tensor, attention_flops: float, stopped: bool, saving: Status, compilations: int, mesh: Mesh
) -> Totals:
    """Return sums over the world, once a step, so that no rank stops, saves or gives up alone. Collective.

    `loss_sums` `[buckets]` and `attention_flops` are this rank's, for all heads.
    """
    # One message for all numbers: a second sum would cost a second latency in every step.
    counts = torch.tensor(
        [stopped, saving == "written", saving == "failed", compilations], dtype=torch.float64, device=mesh.device
    )
    # The ranks of a tensor-parallel group have the same losses and pairs.
    mine = torch.cat([loss_sums.new_tensor([attention_flops]), loss_sums])  # fp64 [1 + buckets]
    total = torch.cat([counts, mine if mesh.tensor_rank == 0 else torch.zeros_like(mine)])  # [5 + buckets]
    dist.all_reduce(total)
    sums = total.tolist()
    flops, *losses = sums[len(counts) :]
    return Totals(flops, tuple(losses), *map(int, sums[: len(counts)]))


def trained_targets(micro_batches: Iterable[MicroBatch], layouts: Mapping[int, BucketLayout], mesh: Mesh) -> list[int]:
    """Return the number of targets of a step's global batch that the loss counts, by bucket. Collective."""
    counts = dict.fromkeys(layouts, 0)
    for micro_batch in micro_batches:
        if micro_batch.trained is not None:
            counts[micro_batch.length] += int(micro_batch.trained.sum())
    total = torch.tensor(list(counts.values())).to(mesh.device)  # [buckets]
    dist.all_reduce(total, group=mesh.data_group)
    # Each rank of a ring has counted the whole sequence.
    return [count // layout.context_parallel for count, layout in zip(total.tolist(), layouts.values(), strict=True)]
