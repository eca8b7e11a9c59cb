"""Merging of partial attention results over disjoint sets of keys."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_(out: Tensor, lse: Tensor, part_outs: Tensor, part_lses: Tensor) -> None:
    """Merge n partial results into the running one, in place, in the order of their first dim.

    out `[b, s, h, d]` and lse `[b, h, s]` are fp32 (fp64 in tests) and hold the running result; part_outs
    `[n, b, s, h, d]` (any dtype) and part_lses `[n, b, h, s]` hold results of the same queries over other keys. Where a
    row has seen no key, running or in a part, its lse is -inf and its out is not read. With w = sigmoid(part_lse - lse)
    the merged row is out + w (part_out - out) and its lse is log(exp(lse) + exp(part_lse)); neither form overflows.
    """
    if out.device.type == "cuda":
        from . import triton_attention  # imported late: a machine without a GPU need not load triton

        triton_attention.merge_(out, lse, part_outs, part_lses)
        return
    for part_out, part_lse in zip(part_outs, part_lses, strict=True):
        weight = torch.sigmoid(part_lse - lse).transpose(1, 2).unsqueeze(-1)  # [b, h, s] -> [b, s, h, 1]
        unseen = part_lse.isneginf().transpose(1, 2).unsqueeze(-1)
        part_out = part_out.to(out.dtype).masked_fill(unseen, 0.0)  # its out may be uninitialized
        # A row that has seen no key takes the part as it is; if the part has seen none either, its out is 0.
        fresh = lse.isneginf().transpose(1, 2).unsqueeze(-1)
        torch.where(fresh, part_out, out + weight * (part_out - out), out=out)
        torch.logaddexp(lse, part_lse, out=lse)
