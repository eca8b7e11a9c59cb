"""RMSNorm with a weight that every tensor-parallel rank holds."""

from __future__ import annotations

import torch
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import Tensor, nn

from .fused import fused_ops


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim (arXiv 1910.07467)."""

    def __init__(self, size: int, epsilon: float, parallel: ModelParallelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=parallel.params_dtype))
        self.epsilon = epsilon
        self.sequence_parallel = parallel.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., size]` -> the same shape and dtype."""
        weight = self.weight
        if self.sequence_parallel:
            # Each tensor-parallel rank sees its own tokens here, so the weight's gradient is the sum over them; this
            # is the identity forward and that sum backward. Without it the ranks' weights drift apart silently.
            weight = copy_to_tensor_model_parallel_region(weight)
        return fused_ops(x).rms_norm(x, weight, self.epsilon)
