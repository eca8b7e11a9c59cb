"""The softmax of a loss head in Triton: its sums, and the gradient of logits in their own memory.

Torch would widen logits to fp32 and pass over them some ten times; these kernels read each logit once forward, and read
and write it once backward. No sum is atomic, so equal runs are bit-equal. No kernel is compiled anew for other numbers
of tokens or vocabulary rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_blocks import aligned

LOG2E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(torch.finfo(torch.float32).min)
BLOCK, NUM_WARPS = 4096, 8
"""Logits that a program holds at a time, 16 for each of its threads."""

VARYING = ["width", "num_rows", "num_blocks", "targets", "largest", "sums", "target_logits", "softmax", "onehot"]
"""Arguments for whose values no kernel is compiled anew."""


@triton.jit
def _with_block(peak, total, block):
    """Return the peak and the total with a block of logits added."""
    x = block.to(tl.float32)
    new_peak = tl.maximum(peak, tl.max(x, 0))
    return new_peak, total * tl.exp2((peak - new_peak) * LOG2E) + tl.sum(tl.exp2((x - new_peak) * LOG2E), 0)


@triton.jit(do_not_specialize=VARYING)
def sums_kernel(logits, targets, largest, sums, target_logits, width: tl.int64, num_rows, BLOCK: tl.constexpr):
    """Write the sums of one token's softmax; programs are tokens."""
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * aligned(logits, width)
    columns = tl.arange(0, BLOCK)
    peak, total = tl.full([], LEAST, tl.float32), tl.full([], 0.0, tl.float32)
    # Invariant: total = sum of exp(logit - peak) over the columns so far. A mask would cut loads into single elements,
    # so the last block alone has one.
    whole = num_rows // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK):
        peak, total = _with_block(peak, total, tl.load(row + start + columns))
    if whole < num_rows:
        block = tl.load(row + whole + columns, mask=whole + columns < num_rows, other=float("-inf"))
        peak, total = _with_block(peak, total, block)
    target = tl.load(targets + token)
    target_logit = tl.load(row + target, mask=target < num_rows, other=0.0).to(tl.float32)
    tl.store(largest + token, peak)
    tl.store(sums + token, total)
    tl.store(target_logits + token, target_logit - peak)


@triton.jit(do_not_specialize=VARYING)
def gradient_kernel(
    logits, targets, largest, softmax, onehot, width: tl.int64, num_rows, num_blocks, BLOCK: tl.constexpr
):
    """Replace a block of one token's logits with their gradient; programs are tokens x blocks."""
    token, block = (tl.program_id(0) // num_blocks).to(tl.int64), tl.program_id(0) % num_blocks
    columns = block * BLOCK + tl.arange(0, BLOCK)
    pointers = logits + token * aligned(logits, width) + columns
    target = tl.where(columns == tl.load(targets + token), tl.load(onehot + token), 0.0)
    peak, factor = tl.load(largest + token), tl.load(softmax + token)
    if (block + 1) * BLOCK <= num_rows:
        x = tl.load(pointers).to(tl.float32)
        tl.store(pointers, (tl.exp2((x - peak) * LOG2E) * factor - target).to(logits.dtype.element_ty))
    else:
        x = tl.load(pointers, mask=columns < num_rows, other=float("-inf")).to(tl.float32)  # padding gets 0
        gradient = (tl.exp2((x - peak) * LOG2E) * factor - target).to(logits.dtype.element_ty)
        tl.store(pointers, gradient, mask=columns < width)


def softmax_sums(logits: Tensor, targets: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest logit, the sum of exp(logit - largest) and target logit - largest of each token, fp32 `[n]`.

    logits are `[n, v]`, contiguous, with rows of a multiple of 16 bytes, and the first `num_rows` columns count;
    targets are int64 columns `[n]`.
    Without columns, the largest is the least fp32 number.
    """
    largest, sums, target_logits = torch.empty(3, len(logits), dtype=torch.float32, device=logits.device)
    sums_kernel[len(logits),](
        logits, targets, largest, sums, target_logits, logits.shape[1], num_rows, BLOCK=BLOCK, num_warps=NUM_WARPS
    )
    return largest, sums, target_logits


def gradient_(
    logits: Tensor, targets: Tensor, num_rows: int, largest: Tensor, softmax: Tensor, onehot: Tensor
) -> Tensor:
    """Return exp(logit - largest) * softmax - onehot at the target, `[n, v]`, in the memory of the logits.

    logits are `[n, v]`, contiguous, with rows of a multiple of 16 bytes, and the first `num_rows` columns have a
    gradient; targets are int64 columns `[n]`, and largest, softmax, onehot fp32 `[n]`.
    """
    num_blocks = -(-logits.shape[1] // BLOCK)
    numbers = logits.shape[1], num_rows, num_blocks
    gradient_kernel[len(logits) * num_blocks,](
        logits, targets, largest, softmax, onehot, *numbers, BLOCK=BLOCK, num_warps=NUM_WARPS
    )
    return logits
