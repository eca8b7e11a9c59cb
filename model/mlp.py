"""The feed-forward network of a transformer layer."""

from __future__ import annotations

from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from .config import ModelConfig
from .fused import fused_ops
from .weights import values_later


class SwiGLU(nn.Module):
    """The feed-forward network down(silu(gate(x)) * up(x)) (arXiv 2002.05202), divided over tensor-parallel ranks."""

    def __init__(self, config: ModelConfig, parallel: ModelParallelConfig) -> None:
        super().__init__()
        # stride=2: a tensor-parallel rank holds its rows of gate, then its rows of up.
        self.gate_up = ColumnParallelLinear(
            config.hidden_size,
            2 * config.ffn_hidden_size,
            config=parallel,
            init_method=values_later,
            bias=False,
            stride=2,
        )
        self.down = RowParallelLinear(
            config.ffn_hidden_size,
            config.hidden_size,
            config=parallel,
            init_method=values_later,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's result for x `[s, b, hidden]`, or this rank's part of s, in the same shape.

        Collective over the tensor-parallel group.
        """
        gate_up, _ = self.gate_up(x)  # [s, b, 2 * ffn_hidden / tp]
        return self.down(fused_ops(gate_up).swiglu(gate_up))[0]
