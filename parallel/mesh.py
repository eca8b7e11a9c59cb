"""The mesh: this rank's tensor-parallel and data-parallel coordinates, and its neighbours for each cp degree.

| axis | ranks | divided among them |
|---|---|---|
| tensor | `parallel.tensor` adjacent ranks | each weight matrix, by heads, rows or columns (megatron-core) |
| data | every `parallel.tensor`-th rank, with equal weights | batches, gradients, optimizer state (DeepSpeed) |
| context | 2, 4, ... adjacent ranks of the data axis | one sequence; its length decides how many ranks |
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig, parallel_state
from torch._C._distributed_c10d import Store

from .config import ParallelConfig
from .cp.group import CommunicatorOptions
from .device import this_device
from .meet import meet
from .world import World


@dataclass(frozen=True)
class Mesh:
    """Coordinates and process groups of this rank, as returned by `join`."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    data_rank: int
    data_size: int
    device: torch.device
    neighbours: dict[int, tuple[int, ...]]
    """Global ranks that share a sequence with this rank, itself included, by context-parallel degree 1, 2, 4, ..."""
    communicator_options: CommunicatorOptions
    """Options of process groups of context parallelism; their timeout is that of all groups."""

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        """Process group of the ranks that share each weight matrix."""
        return _member(parallel_state.get_tensor_model_parallel_group())

    @property
    def data_group(self) -> dist.ProcessGroup:
        """Process group of the ranks that hold equal weights."""
        return _member(parallel_state.get_data_parallel_group())


def join(
    parallel: ParallelConfig, max_context_degree: int, timeout_minutes: float = 10, store: Store | None = None
) -> Mesh:
    """Join the process group that torchrun's environment describes and return this rank's mesh. Collective.

    The ranks find each other through `store`, the one of `meet` by default.
    CUDA processes use GPU LOCAL_RANK and NCCL, others the CPU and gloo. The caller has checked, before any rank waits
    for another, that the world divides by tensor x `max_context_degree` (`Recipe.accumulation_steps`). Raises
    ValueError if parallel.tensor does not divide the world, and as `this_device` does, and
    ConnectionError as `meet` does.
    """
    world = World.from_environment()
    data_size = parallel.data_size(world.size)
    assert data_size % max_context_degree == 0, f"{data_size} data-parallel ranks, rings of {max_context_degree}"
    device = this_device(parallel, world, timeout_minutes)
    if device.type == "cpu":
        # megatron-core allocates on torch.cuda.current_device(); without CUDA that must be the CPU.
        torch.cuda.current_device = lambda: device
    timeout = timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = store or meet(world, timeout)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout_minutes,  # type: ignore[arg-type] (any number of minutes)
    )

    # Tensor-parallel ranks are adjacent; a context-parallel group is an aligned run of the data axis.
    data_rank, tensor_rank = divmod(world.rank, parallel.tensor)
    neighbours = {}
    degree = 1
    while degree <= max_context_degree:
        first = data_rank - data_rank % degree
        neighbours[degree] = tuple((first + i) * parallel.tensor + tensor_rank for i in range(degree))
        degree *= 2
    options = CommunicatorOptions(
        parallel.cp.max_ctas, parallel.cp.high_priority, timeout, peer_copies=parallel.cp.peer_copies
    )
    return Mesh(world.rank, world.size, tensor_rank, parallel.tensor, data_rank, data_size, device, neighbours, options)


def megatron_config(parallel: ParallelConfig, deterministic: bool = False) -> ModelParallelConfig:
    """Return the configuration of megatron-core's layers, which make their weights on torch's default device."""
    return ModelParallelConfig(
        # On a GPU torch's embedding adds the rows of its gradient in any order; megatron-core then indexes instead.
        deterministic_mode=deterministic and torch.cuda.is_available(),
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=torch.float32,
        use_cpu_initialization=True,
        perform_initialization=True,
    )


def _member(group: dist.ProcessGroup | int | None) -> dist.ProcessGroup:
    """Return `group`, which must have this rank as a member: to other ranks torch returns a number or None."""
    assert isinstance(group, dist.ProcessGroup)
    return group
