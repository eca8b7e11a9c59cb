"""RMSNorm with a replicated weight, and over a projection that tensor-parallel ranks divide."""

from __future__ import annotations

import torch
from megatron.core import ModelParallelConfig
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.nn.functional import all_reduce

from .fused import fused_ops


class RMSNorm(nn.Module):
    """The normalization x / rms(x) * weight over the last dim (arXiv 1910.07467)."""

    def __init__(self, size: int, epsilon: float, parallel: ModelParallelConfig, *, of_heads: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=parallel.params_dtype))
        self.epsilon = epsilon
        # Under sequence parallelism each tensor-parallel rank normalizes its own tokens, and always its own heads: the
        # weight's gradient is then a sum over ranks.
        self.sum_gradient = parallel.sequence_parallel or of_heads

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized x `[..., size]`, in the same shape and dtype."""
        weight = self.weight
        if self.sum_gradient:
            # Identity forward and that sum backward; without it the ranks' weights would diverge.
            weight = copy_to_tensor_model_parallel_region(weight)
        return fused_ops(x).rms_norm(x, weight, self.epsilon)


class ProjectionNorm(nn.Module):
    """RMSNorm over all heads of a projection, of which each tensor-parallel rank holds its own, with their weight."""

    def __init__(self, size: int, epsilon: float, parallel: ModelParallelConfig) -> None:
        super().__init__()
        self.tp_group: ProcessGroup = get_tensor_model_parallel_group()  # type: ignore[assignment]
        self.size, self.epsilon = size, epsilon
        self.weight = nn.Parameter(torch.empty(size // self.tp_group.size(), dtype=parallel.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized x `[b, s, h / tp, d]`, in the same shape and dtype; h * d is `size`. Collective."""
        rows = x.flatten(2)  # [b, s, h / tp * d]
        if self.tp_group.size() == 1:
            return fused_ops(x).rms_norm(rows, self.weight, self.epsilon).view_as(x)
        # The sum is over the ranks forward; each rank's part of its gradient is summed backward.
        squares = all_reduce(rows.float().square().sum(-1, keepdim=True), group=self.tp_group)  # [b, s, 1]
        scale = (squares / self.size + self.epsilon).rsqrt()
        return (rows.float() * scale * self.weight).to(x.dtype).view_as(x)
