"""Sums over all ranks that a training step needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.read.loader import MicroBatch
from ..parallel.mesh import Mesh
from .checkpoint.save import Status


class Totals(NamedTuple):
    """Sums over the ranks at the end of a step, equal on all of them."""

    loss_sum: float
    """Sum of the losses of all trained targets, in nats."""
    num_stopped: int
    """Ranks that have received a signal."""
    num_written: int
    """Ranks that have written their part of the save in flight."""
    num_failed: int
    """Ranks that have failed to write it."""
    compilations: int
    """Kernels that the ranks have compiled since their last step."""


def sum_over_ranks(loss_sum: Tensor, stopped: bool, saving: Status, compilations: int, mesh: Mesh) -> Totals:
    """Return sums over the world, once a step, so that no rank stops, saves or gives up alone. Collective."""
    # One message for all numbers: a second sum would cost a second latency in every step.
    counts = [stopped, saving == "written", saving == "failed", compilations]
    total = torch.tensor([0.0, *map(float, counts)], dtype=torch.float64, device=mesh.device)
    if mesh.tensor_rank == 0:  # the ranks of a tensor-parallel group have the same losses
        total[0] = loss_sum
    dist.all_reduce(total)
    loss, *sums = total.tolist()
    return Totals(loss, *map(int, sums))


def trained_targets(micro_batches: Iterable[MicroBatch], context_parallel: int, mesh: Mesh) -> int:
    """Return the number of targets of a step's global batch that the loss counts. Collective."""
    count = torch.tensor(sum(int(batch.trained.sum()) for batch in micro_batches if batch.trained is not None))
    count = count.to(mesh.device)
    dist.all_reduce(count, group=mesh.data_group)
    return int(count) // context_parallel  # each rank of a ring has counted the whole sequence
