"""RMSNorm with a weight that is replicated on all tensor-parallel ranks."""

from __future__ import annotations

import torch
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import Tensor, nn

from .fused import fused_ops


class RMSNorm(nn.Module):
    """The normalization x / rms(x) * weight over the last dim (arXiv 1910.07467)."""

    def __init__(self, size: int, epsilon: float, parallel: ModelParallelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=parallel.params_dtype))
        self.epsilon = epsilon
        self.sequence_parallel = parallel.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized x `[..., size]`, in the same shape and dtype."""
        weight = self.weight
        if self.sequence_parallel:
            # Each tensor-parallel rank normalizes its own tokens, so the weight's gradient is a sum over ranks. This
            # function is the identity forward and that sum backward; without it the ranks' weights would diverge.
            weight = copy_to_tensor_model_parallel_region(weight)
        return fused_ops(x).rms_norm(x, weight, self.epsilon)
