"""The feed-forward network of a transformer layer, whole or in tiles of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .config import ModelConfig
from .fused import fused_ops
from .weights import values_later


class SwiGLU(nn.Module):
    """The feed-forward network down(silu(gate(x)) * up(x)) (arXiv 2002.05202), divided over tensor-parallel ranks.

    In tiles, it uses the weights of its two projections itself: ZeRO 3 must gather both around it.
    """

    def __init__(self, config: ModelConfig, parallel: ModelParallelConfig, tile_tokens: int = 0) -> None:
        super().__init__()
        self.tile_tokens, self.sequence_parallel = tile_tokens, parallel.sequence_parallel
        self.uses_weights_of_children = tile_tokens > 0
        # stride=2: a tensor-parallel rank holds its rows of gate, then its rows of up.
        self.gate_up = ColumnParallelLinear(
            config.hidden_size,
            2 * config.ffn_hidden_size,
            config=parallel,
            init_method=values_later,
            bias=False,
            stride=2,
        )
        self.down = _Down(
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
        if not self.tile_tokens:
            gate_up, _ = self.gate_up(x)  # [s, b, 2 * ffn_hidden / tp]
            return self.down(fused_ops(gate_up).swiglu(gate_up))[0]
        gathered_over = self.gate_up.tp_group if self.sequence_parallel else None
        if gathered_over is None:  # identity forward, sum of the ranks' dx backward
            x = copy_to_tensor_model_parallel_region(x, group=self.gate_up.tp_group)
        weights = self.gate_up.weight, self.down.weight
        part = _TiledSwiGLU.apply(x, *weights, self.tile_tokens, gathered_over, self.down.is_skipped)  # [s, b, hidden]
        reduce = (
            reduce_scatter_to_sequence_parallel_region if gathered_over else reduce_from_tensor_model_parallel_region
        )
        return reduce(part, group=self.gate_up.tp_group)

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Let the network only keep what its backward needs: its result then has arbitrary values.

        Recomputation in the backward needs no more of a network whose result nothing has kept. With tiles, the backward
        computes everything else.
        """
        self.down.is_skipped = True
        try:
            yield
        finally:
            self.down.is_skipped = False


class _Down(RowParallelLinear):
    """The projection back from SwiGLU's width, a module for ZeRO 3 to gather its weight around."""

    is_skipped = False
    """Whether to return arbitrary values, and only keep the tensors that megatron-core's product keeps."""

    def forward(self, input_: Tensor) -> tuple[Any, Any]:
        return (_Kept.apply(input_, self.weight), None) if self.is_skipped else super().forward(input_)


class _Kept(torch.autograd.Function):
    """A result of arbitrary values `[..., n]` that keeps x `[..., k]` and weight `[n, k]`; it has no backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_empty((*x.shape[:-1], len(weight)))


class _TiledSwiGLU(torch.autograd.Function):
    """This rank's term of the network's result, `[s, b, hidden]`, from x and its rows and columns of the weights.

    x is `[s, b, hidden]`, or with a group to gather it over, this rank's `[s / tp, b, hidden]`. Both passes take the
    tokens in tiles; gradients of weights are summed over tiles in fp32. The backward's gradient of x is this rank's
    term of the sum over ranks, or with a group its part of that sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        tile_tokens: int,
        group: dist.ProcessGroup | None,
        is_skipped: bool,
    ) -> Tensor:
        # The parameters themselves are saved, not views of them: ZeRO 3 gathers them again before the backward.
        ctx.save_for_backward(x, gate_up, down)
        ctx.tile_tokens, ctx.group = tile_tokens, group
        result = x.new_empty((x.shape[0] * (group.size() if group else 1), *x.shape[1:]))
        if not is_skipped:
            rows, results = _gathered(x, group).flatten(0, 1), result.flatten(0, 1)  # [s * b, hidden]
            for tile in _tiles(len(rows), tile_tokens):
                hidden = rows[tile] @ gate_up.t()
                results[tile] = fused_ops(hidden).swiglu(hidden) @ down.t()
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dresult: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:  # type: ignore[override]
        x, gate_up, down = ctx.saved_tensors
        rows, dresults = _gathered(x, ctx.group).flatten(0, 1), dresult.flatten(0, 1)  # [s * b, hidden]
        drows = torch.empty_like(rows)
        dgate_up, ddown = (torch.zeros_like(weight, dtype=torch.float32) for weight in (gate_up, down))
        for tile in _tiles(len(rows), ctx.tile_tokens):
            hidden = (rows[tile] @ gate_up.t()).requires_grad_()  # [tile, 2 * ffn_hidden / tp]
            with torch.enable_grad():
                product = fused_ops(hidden).swiglu(hidden)
            ddown += dresults[tile].t() @ product.detach()
            [dhidden] = torch.autograd.grad(product, hidden, dresults[tile] @ down)
            dgate_up += dhidden.t() @ rows[tile]
            drows[tile] = dhidden @ gate_up
        dx = drows.view(-1, *x.shape[1:])
        if ctx.group is not None:
            whole, dx = dx, torch.empty_like(x)
            dist.reduce_scatter_tensor(dx, whole, group=ctx.group)
        return dx, dgate_up.to(gate_up.dtype), ddown.to(down.dtype), None, None, None


def _gathered(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the parts of x of all ranks of a group, joined along the first dim."""
    if group is None:
        return x
    whole = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole


def _tiles(num_tokens: int, tile_tokens: int) -> Iterator[slice]:
    return (slice(first, first + tile_tokens) for first in range(0, num_tokens, tile_tokens))
