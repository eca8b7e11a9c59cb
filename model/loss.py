"""The output head and its cross entropy, computed in slices of tokens, so that the logits never exist as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
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

from .config import LOGIT_BYTES, ModelConfig
from .weights import values_later


@dataclass(frozen=True)
class SliceSoftmax:
    """One implementation of the softmax of a slice of tokens over this rank's vocabulary rows, forward and backward.

    products are the logits `[n, v]` in the model's dtype, of which the first `num_rows` columns count; rows are the
    targets as columns, int64 `[n]`; other tensors are fp32 `[n]`.
    """

    sums: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
    """(products, rows, num_rows) -> the largest logit, the sum of exp(logit - largest), and target logit - largest.
    Products in fp32 may be overwritten by what `gradient` needs in their place."""
    gradient: Callable[..., Tensor]
    """(products, is_kept, rows, num_rows, largest, softmax, onehot) -> exp(logit - largest) * softmax, less onehot at
    the target, `[n, v]` in the products' dtype. If `is_kept`, the products are those that `sums` has had, else
    they are computed anew. They may be overwritten."""
    logit_bytes: Callable[[torch.dtype], int]
    """(dtype of the products) -> bytes that a slice takes for each of its logits."""


def slice_softmax(weight: Tensor) -> SliceSoftmax:
    """Return the implementation for this rank's vocabulary rows, `[v, hidden]`, on their device."""
    # Triton's kernels read rows of logits 16 bytes at a time.
    return TRITON if weight.is_cuda and len(weight) * weight.itemsize % 16 == 0 else TORCH


class LossHead(ColumnParallelLinear):
    """The output projection and softmax cross entropy; tensor-parallel ranks divide the vocabulary rows.

    The rows that pad the vocabulary to a multiple of 128 have no part in the softmax, and no gradient.
    Both are one module, so that ZeRO-3's hooks gather the weight around its forward and again around its backward.
    """

    def __init__(
        self, config: ModelConfig, vocab_size: int, parallel: ModelParallelConfig, kept_logit_bytes: int = 0
    ) -> None:
        super().__init__(
            config.hidden_size,
            config.padded_vocab_size(vocab_size),
            config=parallel,
            init_method=values_later,
            bias=False,
        )
        self.vocab_size, self.z_loss = config.num_tokens(vocab_size), config.z_loss
        self.kept_logit_bytes = kept_logit_bytes

    def forward(self, x: Tensor, targets: Tensor, greedy: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Return the loss of every token in nats, fp32 `[b, s]`. Collective over the tensor-parallel group.

        x is `[s, b, hidden]`, or under sequence parallelism this rank's `[s / tp, b, hidden]`; targets are int64
        `[b, s]`, equal on all tensor-parallel ranks. `greedy`, int64 `[b, s]`, is filled with the tokens of the largest
        logits, one of equals.
        """
        # Each rank computes the gradient of x from its own vocabulary rows; the backward of these functions sums them.
        if self.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, group=self.tp_group)
        else:
            x = copy_to_tensor_model_parallel_region(x, group=self.tp_group)
        # x [s, b, hidden] -> [s * b, hidden]; targets [b, s] -> [s * b]; losses [s * b] -> [b, s]
        best = None if greedy is None else torch.empty_like(targets.t().flatten())
        losses, logs = _LinearCrossEntropy.apply(
            *(x.flatten(0, 1), self.weight, targets.t().flatten(), best),
            *(self.vocab_size, self.tp_group, self.kept_logit_bytes),
        )
        if greedy is not None and best is not None:
            greedy.copy_(best.view(x.shape[:2]).t())
        if self.z_loss:
            # It has a gradient and no value: losses of runs with and without it compare.
            squares = self.z_loss * logs.square()
            losses = losses + (squares - squares.detach())
        return losses.view(x.shape[:2]).t()


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss of each token, from x `[n, hidden]`, this rank's weight rows `[v, hidden]` and targets `[n]`.

    It returns losses and the logarithms of the softmax's denominators, both fp32 `[n]`, and writes the tokens of the
    largest logits into `best`, int64 `[n]`, if given.

    Logits are computed in the model's dtype and reduced in fp32, by `slice_softmax`. The logits of the first slices
    are kept, up to `kept_bytes`. The backward computes the others again, with the same bits; its gradient of x is this
    rank's term of the sum over ranks.

    liger's and torch's own losses do not serve: they have no tensor parallelism (and liger's per-token loss saves a
    detached weight, which ZeRO-3 cannot free), or they sum the weight's gradient over slices in bf16 (liger's
    tensor-parallel loss).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        best: Tensor | None,
        vocab_size: int,
        group: dist.ProcessGroup,
        kept_bytes: int,
    ) -> tuple[Tensor, Tensor]:
        # Targets as rows of this rank's weight; `here` marks those that it holds.
        rows = targets - group.rank() * len(weight)
        here = (rows >= 0) & (rows < len(weight))
        rows = rows.where(here, 0)
        largest, sums, target_logits = torch.empty(3, len(x), dtype=torch.float32, device=x.device)
        ctx.num_rows = max(0, vocab_size - group.rank() * len(weight))  # those after them are padding
        softmax, kept = slice_softmax(weight), []
        for part in _token_slices(x, weight, softmax):
            products = x[part] @ weight.t()
            kept_bytes -= products.nbytes
            if kept_bytes >= 0 and ctx.needs_input_grad[0]:
                kept.append(products)
            if best is not None:
                best[part] = products[:, : max(1, ctx.num_rows)].argmax(-1) + group.rank() * len(weight)
            largest[part], sums[part], target_logits[part] = softmax.sums(products, rows[part], ctx.num_rows)
            del products  # freed before the next slice's are allocated
        # Ranks reduce once, after the last slice: each shifts its sum of exponentials to the largest logit of all.
        overall = largest.clone()
        dist.all_reduce(overall, dist.ReduceOp.MAX, group)
        if best is not None:
            best.masked_fill_(largest < overall, torch.iinfo(best.dtype).max)  # another rank has the largest logit
            dist.all_reduce(best, dist.ReduceOp.MIN, group)
        shift = largest - overall
        totals = torch.stack([sums * shift.exp(), (target_logits + shift).where(here, 0)])
        dist.all_reduce(totals, dist.ReduceOp.SUM, group)
        total, target_logit = totals
        # The parameter itself is saved, not a view of it: ZeRO-3 gathers it again before the backward.
        ctx.save_for_backward(x, weight, largest, shift, total, rows, here, *kept)
        return total.log() - target_logit, total.log() + overall

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, dlog: Tensor) -> tuple[Tensor, Tensor, *tuple[None, ...]]:  # type: ignore[override]
        x, weight, largest, shift, total, rows, here, *kept = ctx.saved_tensors
        # dlogits = (dloss + dlog) * softmax - dloss * onehot, softmax = exp(logits - largest) * exp(shift) / total
        onehot, softmax = dloss * here, (dloss + dlog) * shift.exp() / total
        dx, dweight = torch.empty_like(x), None
        ops = slice_softmax(weight)
        for part, found in zip_longest(_token_slices(x, weight, ops), kept):
            dlogits = ops.gradient(
                x[part] @ weight.t() if found is None else found,
                *(found is not None, rows[part], ctx.num_rows, largest[part], softmax[part], onehot[part]),
            )
            dx[part] = dlogits @ weight
            term = dlogits.t() @ x[part]  # [v, hidden]
            dweight = term.float() if dweight is None else dweight.add_(term)
            del dlogits, term
        assert dweight is not None, "a micro-batch has tokens"
        return dx, dweight.to(weight.dtype), None, None, None, None, None


def _torch_sums(products: Tensor, rows: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    logits = _logits(products, num_rows)  # products themselves in fp32: kept as their exponentials
    largest = logits.amax(-1)
    logits.sub_(largest[:, None])
    target_logits = logits.gather(1, rows[:, None])[:, 0]
    return largest, logits.exp_().sum(-1), target_logits


def _torch_gradient(
    products: Tensor, is_kept: bool, rows: Tensor, num_rows: int, largest: Tensor, softmax: Tensor, onehot: Tensor
) -> Tensor:
    dtype = products.dtype
    if is_kept and dtype == torch.float32:
        dlogits = products  # the exponentials, overwritten
    else:
        dlogits = _logits(products, num_rows).sub_(largest[:, None]).exp_()
    del products
    dlogits.mul_(softmax[:, None])
    dlogits[torch.arange(len(dlogits), device=rows.device), rows] -= onehot
    return dlogits.to(dtype)


def _logits(products: Tensor, num_rows: int) -> Tensor:
    """Return products `[n, v]` in fp32, the same tensor if they are; those from `num_rows` on leave the softmax."""
    logits = products.float()
    logits[:, num_rows:] = torch.finfo(torch.float32).min  # -inf less -inf, on a rank of padding alone, would be nan
    return logits


# Triton is imported late: a machine without CUDA need not have it.


def _triton_sums(products: Tensor, rows: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels import triton_loss

    return triton_loss.softmax_sums(products, rows, num_rows)


def _triton_gradient(
    products: Tensor, is_kept: bool, rows: Tensor, num_rows: int, largest: Tensor, softmax: Tensor, onehot: Tensor
) -> Tensor:
    from ..kernels import triton_loss

    return triton_loss.gradient_(products, rows, num_rows, largest, softmax, onehot)


TORCH = SliceSoftmax(_torch_sums, _torch_gradient, lambda dtype: 4)
TRITON = SliceSoftmax(_triton_sums, _triton_gradient, lambda dtype: dtype.itemsize)


def token_slice(vocab_rows: int, logit_bytes: int) -> int:
    """Return the number of tokens of a slice, whose logits fit into LOGIT_BYTES: a power of two."""
    return 1 << max(0, (LOGIT_BYTES // (logit_bytes * vocab_rows)).bit_length() - 1)


def _token_slices(x: Tensor, weight: Tensor, softmax: SliceSoftmax) -> Iterator[slice]:
    """Yield slices of `token_slice` tokens of x `[n, hidden]`, with a shorter last one."""
    size = token_slice(len(weight), softmax.logit_bytes(x.dtype))
    return (slice(first, first + size) for first in range(0, len(x), size))
