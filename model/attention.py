"""The projections of grouped-query self-attention; the attention function itself is an argument of the model."""

from __future__ import annotations

from collections.abc import Callable

from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from .config import ModelConfig
from .fused import fused_ops
from .norm import ProjectionNorm, RMSNorm
from .weights import values_later

AttentionFunction = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]
"""A function (q `[b, s, h_q, d]`, k, v `[b, s, h_kv, d]`, attention window in tokens or None) -> out `[b, s, h_q, d]`.

It is made for one `SeqLayout` of s, and under context parallelism it communicates with the other ranks of the sequence.
"""


class SelfAttention(nn.Module):
    """The projections to q, k, v with RoPE, and the output projection; tensor-parallel ranks divide the heads.

    `TransformerLayer` calls attention between the two, so that recomputation leaves it out.
    """

    def __init__(self, config: ModelConfig, parallel: ModelParallelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.queries_per_kv = config.num_heads // config.num_kv_heads
        # One projection for q, k, v, with rows ordered by kv head (its queries, then its key, then its value), so that
        # tensor parallelism cuts between kv heads.
        self.qkv = ColumnParallelLinear(
            config.hidden_size,
            (config.num_heads + 2 * config.num_kv_heads) * config.head_dim,
            config=parallel,
            init_method=values_later,
            bias=config.qkv_bias,
        )
        self.q_norm, self.k_norm = (
            _head_norm(config, heads, parallel) for heads in (config.num_heads, config.num_kv_heads)
        )
        self.out = RowParallelLinear(
            config.num_heads * config.head_dim,
            config.hidden_size,
            config=parallel,
            init_method=values_later,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
        )

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return q `[b, s, h_q / tp, d]` and k, v `[b, s, h_kv / tp, d]` of x, with norms and RoPE applied to q and k.

        x is `[s, b, hidden]`, or under sequence parallelism this rank's `[s / tp, b, hidden]`; `rope` is the cos and
        sin of `rope_table`, each `[s, d / 2]`, or None for a layer without RoPE. Collective over the tensor-parallel
        group.
        """
        qkv, _ = self.qkv(x)
        # [s, b, h_kv / tp * (queries_per_kv + 2) * d] -> [b, s, h_kv / tp, queries_per_kv + 2, d]
        qkv = qkv.unflatten(-1, (-1, self.queries_per_kv + 2, self.head_dim)).transpose(0, 1)
        # A split, and not three slices: its backward joins the gradients once, and theirs would pad and add them.
        q, k, v = qkv.split([self.queries_per_kv, 1, 1], dim=3)
        q, k, v = (y.flatten(2, 3) for y in (q, k, v))  # [b, s, h / tp, d]
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = fused_ops(q).rope(q, k, rope)
        # A view would keep the memory of all three until the backward.
        return q.contiguous(), k.contiguous(), v.contiguous()

    def project_back(self, out: Tensor) -> Tensor:
        """Return the output projection `[s, b, hidden]` of attention's result `[b, s, h_q / tp, d]`.

        Under sequence parallelism the result is this rank's `[s / tp, b, hidden]`. Collective over the tensor-parallel
        group.
        """
        # [b, s, h_q / tp, d] -> [s, b, h_q / tp * d]
        return self.out(out.flatten(2).transpose(0, 1).contiguous())[0]


def _head_norm(config: ModelConfig, num_heads: int, parallel: ModelParallelConfig) -> nn.Module:
    """Return the norm of q or k `[b, s, h / tp, d]`, with the number of its heads on all ranks."""
    if config.qk_norm == "head":
        return RMSNorm(config.head_dim, config.norm_epsilon, parallel, of_heads=True)
    if config.qk_norm == "projection":
        return ProjectionNorm(num_heads * config.head_dim, config.norm_epsilon, parallel)
    return nn.Identity()
