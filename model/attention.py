"""Grouped-query self-attention; how tokens see each other is an argument."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from .config import ModelConfig
from .fused import fused_ops

AttentionFunction = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]
"""(q `[b, s, h_q, d]`, k, v `[b, s, h_kv, d]`, window in tokens or None) -> out `[b, s, h_q, d]`; it knows the layout
of s."""


class SelfAttention(nn.Module):
    """The projections to heads, turned by RoPE, and back. Heads are divided over the tensor-parallel ranks.

    Attention itself stands between them, in `TransformerLayer`: recomputation spares it.
    """

    def __init__(self, config: ModelConfig, parallel: ModelParallelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.queries_per_kv = config.num_heads // config.num_kv_heads
        init = partial(torch.nn.init.normal_, std=config.init_std)
        init_out = partial(torch.nn.init.normal_, std=config.init_std / (2 * config.num_layers) ** 0.5)
        # One projection for q, k, v: rows go by kv head (its queries, then its key, then its value), so that a cut
        # across tensor-parallel ranks falls between kv heads.
        self.qkv = ColumnParallelLinear(
            config.hidden_size,
            (config.num_heads + 2 * config.num_kv_heads) * config.head_dim,
            config=parallel,
            init_method=init,
            bias=False,
        )
        self.out = RowParallelLinear(
            config.num_heads * config.head_dim,
            config.hidden_size,
            config=parallel,
            init_method=init_out,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
        )

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x `[s, b, hidden]` (under sequence parallelism this rank's part of s) -> q, k, v `[b, s, heads here, d]`."""
        qkv, _ = self.qkv(x)
        # [s, b, kv heads here * (queries_per_kv + 2) * d] -> [b, s, kv heads here, queries_per_kv + 2, d]
        qkv = qkv.unflatten(-1, (-1, self.queries_per_kv + 2, self.head_dim)).transpose(0, 1)
        q = qkv[:, :, :, :-2].flatten(2, 3)
        k, v = qkv[:, :, :, -2], qkv[:, :, :, -1]
        q, k = fused_ops(q).rope(q, k, rope)
        return q, k, v

    def project_back(self, out: Tensor) -> Tensor:
        """Attention's result `[b, s, heads here, d]` -> `[s, b, hidden]`, or this rank's part of s."""
        return self.out(out.flatten(2).transpose(0, 1).contiguous())[0]
