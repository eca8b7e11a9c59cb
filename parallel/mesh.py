"""This process's place in the world: tensor-parallel slice, data-parallel rank, neighbours for each context degree.

| axis | ranks along it | for |
|---|---|---|
| tensor | neighbours, `parallel.tensor` of them | each weight matrix cut by heads or columns (megatron-core) |
| data | every `parallel.tensor`-th rank | gradients, optimizer state (DeepSpeed); all ranks that hold equal weights |
| context | neighbours along data, 2, 4, ... of them | one sequence; the batch decides how many |
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig, parallel_state

from .config import ParallelConfig


@dataclass(frozen=True)
class Mesh:
    """Coordinates and groups of this rank. Made by `join`."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    data_rank: int
    data_size: int
    device: torch.device
    neighbours: dict[int, tuple[int, ...]]
    """By context-parallel degree 1, 2, 4, ...: the ranks, of the world, that share a sequence with this one."""

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        """The ranks that share each weight matrix."""
        return _member(parallel_state.get_tensor_model_parallel_group())

    @property
    def data_group(self) -> dist.ProcessGroup:
        """The ranks that hold equal weights."""
        return _member(parallel_state.get_data_parallel_group())


def join(parallel: ParallelConfig, max_context_degree: int, timeout_minutes: float = 10) -> Mesh:
    """Join the process group that torchrun's environment describes and lay the mesh over it. Collective.

    Uses this process's GPU and NCCL where there is CUDA, else the CPU and gloo. The caller has checked that the world
    can be divided so (`Recipe.accumulation_steps`), before any rank waits for another.
    """
    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    data_size = parallel.data_size(world_size)
    assert data_size % max_context_degree == 0, f"{data_size} data-parallel ranks, rings of {max_context_degree}"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        # Compiled kernels on this node's own disk, a directory for each rank: homes on a network file system are slow,
        # and ranks that compile the same kernel at once need not meet in one file.
        cache = Path(tempfile.gettempdir(), f"triton-{os.getuid()}", f"rank-{device.index}")
        os.environ.setdefault("TRITON_CACHE_DIR", str(cache))
    else:
        device = torch.device("cpu")
        # megatron-core allocates on torch.cuda.current_device(); where there is none, the answer is the CPU.
        torch.cuda.current_device = lambda: device
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=timeout_minutes))
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor, create_gloo_process_groups=False
    )

    data_rank, tensor_rank = divmod(rank, parallel.tensor)
    neighbours = {}
    degree = 1
    while degree <= max_context_degree:
        first = data_rank - data_rank % degree
        neighbours[degree] = tuple((first + i) * parallel.tensor + tensor_rank for i in range(degree))
        degree *= 2
    return Mesh(rank, world_size, tensor_rank, parallel.tensor, data_rank, data_size, device, neighbours)


def megatron_config(parallel: ParallelConfig) -> ModelParallelConfig:
    """What megatron-core's layers need to know. Weights are fp32 here; DeepSpeed converts them."""
    return ModelParallelConfig(
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=torch.float32,
        use_cpu_initialization=True,
        perform_initialization=True,
    )


def _member(group: dist.ProcessGroup | int | None) -> dist.ProcessGroup:
    """The group, of which this rank is a member; torch answers a rank that is none with a number."""
    assert isinstance(group, dist.ProcessGroup)
    return group
