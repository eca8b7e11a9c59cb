"""The output head and its cross entropy, computed in slices of tokens, so that the logits never exist as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import once_differentiable

from .config import ModelConfig
from .weights import values_later

LOGIT_BYTES = 512 * 2**20
"""The largest number of bytes of one slice's fp32 logits on a rank; a bf16 model also holds a bf16 copy of them.

It is small beside the weight's fp32 gradient at sizes that matter (2 GiB for 131,072 rows of 4,096). It is not smaller,
since every slice reads and writes that gradient once: with these rows a slice is 1,024 tokens, and its three products
take 500 FLOPs per byte moved, where a GPU balances at 200 to 300.
"""


class LossHead(ColumnParallelLinear):
    """The output projection and softmax cross entropy; tensor-parallel ranks divide the vocabulary rows.

    The rows that pad the vocabulary to a multiple of 128 have no part in the softmax, and no gradient.
    Both are one module, so that ZeRO-3's hooks gather the weight around its forward and again around its backward.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, parallel: ModelParallelConfig) -> None:
        super().__init__(
            config.hidden_size,
            config.padded_vocab_size(vocab_size),
            config=parallel,
            init_method=values_later,
            bias=False,
        )
        self.vocab_size, self.z_loss = config.num_tokens(vocab_size), config.z_loss

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        """Return the loss of every token in nats, fp32 `[b, s]`. Collective over the tensor-parallel group.

        x is `[s, b, hidden]`, or under sequence parallelism this rank's `[s / tp, b, hidden]`; targets are int64
        `[b, s]`, equal on all tensor-parallel ranks.
        """
        # Each rank computes the gradient of x from its own vocabulary rows; the backward of these functions sums them.
        if self.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, group=self.tp_group)
        else:
            x = copy_to_tensor_model_parallel_region(x, group=self.tp_group)
        # x [s, b, hidden] -> [s * b, hidden]; targets [b, s] -> [s * b]; losses [s * b] -> [b, s]
        losses, logs = _LinearCrossEntropy.apply(
            x.flatten(0, 1), self.weight, targets.t().flatten(), self.vocab_size, self.tp_group
        )
        if self.z_loss:
            # It has a gradient and no value: losses of runs with and without it compare.
            squares = self.z_loss * logs.square()
            losses = losses + (squares - squares.detach())
        return losses.view(x.shape[:2]).t()


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss of each token, from x `[n, hidden]`, this rank's weight rows `[v, hidden]` and targets `[n]`.

    It returns losses and the logarithms of the softmax's denominators, both fp32 `[n]`.

    Logits are computed in the model's dtype and reduced in fp32. The backward computes each slice's logits again; its
    gradient of x is this rank's term of the sum over ranks.

    liger's and torch's own losses do not serve: they have no tensor parallelism (and liger's per-token loss saves a
    detached weight, which ZeRO-3 cannot free), or they sum the weight's gradient over slices in bf16 (liger's
    tensor-parallel loss).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        # Targets as rows of this rank's weight; `here` marks those that it holds.
        rows = targets - group.rank() * len(weight)
        here = (rows >= 0) & (rows < len(weight))
        rows = rows.where(here, 0)
        largest, sums, target_logits = torch.empty(3, len(x), dtype=torch.float32, device=x.device)
        ctx.num_rows = max(0, vocab_size - group.rank() * len(weight))  # those after them are padding
        for part in _token_slices(len(x), len(weight)):
            logits = _logits(x[part], weight, ctx.num_rows)
            largest[part] = logits.amax(-1)
            logits.sub_(largest[part, None])
            target_logits[part] = logits.gather(1, rows[part, None])[:, 0]
            sums[part] = logits.exp_().sum(-1)
            del logits  # freed before the next slice's logits are allocated
        # Ranks reduce once, after the last slice: each shifts its sum of exponentials to the largest logit of all.
        overall = largest.clone()
        dist.all_reduce(overall, dist.ReduceOp.MAX, group)
        shift = largest - overall
        totals = torch.stack([sums * shift.exp(), (target_logits + shift).where(here, 0)])
        dist.all_reduce(totals, dist.ReduceOp.SUM, group)
        total, target_logit = totals
        # The parameter itself is saved, not a view of it: ZeRO-3 gathers it again before the backward.
        ctx.save_for_backward(x, weight, overall, total, rows, here)
        return total.log() - target_logit, total.log() + overall

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, dlog: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        x, weight, overall, total, rows, here = ctx.saved_tensors
        # dlogits = (dloss + dlog) * softmax - dloss * onehot, where softmax = exp(logits - overall) / total.
        onehot, softmax = dloss * here, (dloss + dlog) / total
        dx = torch.empty_like(x)
        dweight = torch.zeros_like(weight, dtype=torch.float32)
        for part in _token_slices(len(x), len(weight)):
            dlogits = _logits(x[part], weight, ctx.num_rows)  # [slice, v]; the next two lines work in place
            dlogits.sub_(overall[part, None]).exp_().mul_(softmax[part, None])
            dlogits[torch.arange(len(dlogits), device=x.device), rows[part]] -= onehot[part]
            dlogits = dlogits.to(x.dtype)
            dx[part] = dlogits @ weight
            dweight += dlogits.t() @ x[part]
            del dlogits
        return dx, dweight.to(weight.dtype), None, None, None


def _logits(x: Tensor, weight: Tensor, num_rows: int) -> Tensor:
    """Return the logits `[n, v]` of x `[n, hidden]` in fp32; those from `num_rows` on have no part in a softmax."""
    logits = (x @ weight.t()).float()
    logits[:, num_rows:] = torch.finfo(torch.float32).min  # -inf less -inf, on a rank of padding alone, would be nan
    return logits


def _token_slices(num_tokens: int, vocab_rows: int) -> Iterator[slice]:
    """Yield slices of tokens whose fp32 logits fit into LOGIT_BYTES: equal powers of two, with a shorter last one."""
    size = 1 << max(0, (LOGIT_BYTES // (4 * vocab_rows)).bit_length() - 1)
    return (slice(first, first + size) for first in range(0, num_tokens, size))
