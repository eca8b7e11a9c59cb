"""The head and its cross entropy, a chunk of tokens at a time: the logits of all tokens never exist at once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .config import ModelConfig

LOGIT_BYTES = 512 * 2**20
"""Most bytes of a chunk's logits in fp32 on one rank; beside them lies a copy in bf16, where that is the dtype.

Small beside the weight's fp32 gradient at sizes that matter (2 GiB for 131,072 rows of 4,096), yet not too small, for
each chunk reads and writes that gradient once: of those rows a chunk is 1,024 tokens, and its three products take 500
operations for each byte so moved, where a GPU balances at 200 to 300.
"""


class LossHead(ColumnParallelLinear):
    """The output projection and softmax cross entropy; vocabulary rows are divided over the tensor-parallel ranks.

    One module does both, so that ZeRO-3's hooks gather the weight around its forward and again around its backward.
    """

    def __init__(self, config: ModelConfig, vocab_rows: int, parallel: ModelParallelConfig) -> None:
        super().__init__(
            config.hidden_size,
            vocab_rows,
            config=parallel,
            init_method=partial(nn.init.normal_, std=config.init_std),
            bias=False,
        )

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        """Loss of every token, nats, fp32 `[b, s]`.

        x `[s, b, hidden]` (under sequence parallelism this rank's part of s), targets int64 `[b, s]`, equal on all
        tensor-parallel ranks.
        """
        # Each rank's gradient of x comes from its vocabulary rows: summed over ranks by these functions' backward.
        if self.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, group=self.tp_group)
        else:
            x = copy_to_tensor_model_parallel_region(x, group=self.tp_group)
        losses = _LinearCrossEntropy.apply(x.flatten(0, 1), self.weight, targets.t().flatten(), self.tp_group)
        return losses.view(x.shape[:2]).t()


class _LinearCrossEntropy(torch.autograd.Function):
    """x `[n, hidden]`, this rank's rows of the weight `[v, hidden]`, targets `[n]` -> loss of each token `[n]` fp32.

    Logits are formed in the model's dtype, statistics in fp32. The backward forms each chunk's logits again. Its
    gradient of x is this rank's summand.

    Why not liger's or torch's own: they have no tensor parallelism (liger's per-token loss also saves a detached
    weight, which ZeRO-3 cannot free), or sum the weight's gradient over chunks in bf16 (liger's tensor-parallel one).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, group: dist.ProcessGroup) -> Tensor:
        rows = targets - group.rank() * len(weight)
        here = (rows >= 0) & (rows < len(weight))
        rows = rows.where(here, 0)
        largest, sums, target_logits = torch.empty(3, len(x), dtype=torch.float32, device=x.device)
        for chunk in _chunks(len(x), len(weight)):
            logits = (x[chunk] @ weight.t()).float()
            largest[chunk] = logits.amax(-1)
            logits.sub_(largest[chunk, None])
            target_logits[chunk] = logits.gather(1, rows[chunk, None])[:, 0]
            sums[chunk] = logits.exp_().sum(-1)
            del logits  # before the next chunk's are made
        # Ranks meet once, after the last chunk: from each its sum of exponentials, shifted to the largest logit of all.
        overall = largest.clone()
        dist.all_reduce(overall, dist.ReduceOp.MAX, group)
        shift = largest - overall
        totals = torch.stack([sums * shift.exp(), (target_logits + shift).where(here, 0)])
        dist.all_reduce(totals, dist.ReduceOp.SUM, group)
        total, target_logit = totals
        # The parameter itself is saved, not a view of it: ZeRO-3 fills it again before the backward.
        ctx.save_for_backward(x, weight, overall, total, rows, here)
        return total.log() - target_logit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        x, weight, overall, total, rows, here = ctx.saved_tensors
        onehot, softmax = dloss * here, dloss / total
        dx = torch.empty_like(x)
        dweight = torch.zeros_like(weight, dtype=torch.float32)
        for chunk in _chunks(len(x), len(weight)):
            dlogits = (x[chunk] @ weight.t()).float()
            dlogits.sub_(overall[chunk, None]).exp_().mul_(softmax[chunk, None])
            dlogits[torch.arange(len(dlogits), device=x.device), rows[chunk]] -= onehot[chunk]
            dlogits = dlogits.to(x.dtype)
            dx[chunk] = dlogits @ weight
            dweight += dlogits.t() @ x[chunk]
            del dlogits
        return dx, dweight.to(weight.dtype), None, None


def _chunks(num_tokens: int, vocab_rows: int) -> Iterator[slice]:
    """Slices of tokens whose fp32 logits fit into LOGIT_BYTES; a power of two each, the last may be shorter."""
    size = 1 << max(0, (LOGIT_BYTES // (4 * vocab_rows)).bit_length() - 1)
    return (slice(first, first + size) for first in range(0, num_tokens, size))
