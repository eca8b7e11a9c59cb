"""Merge partial attention results over disjoint sets of keys."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Fold a partial result into the running one, in place.

    out `[b, s, h, d]` and lse `[b, h, s]` are fp32 (fp64 in tests) and hold the running result; part_out (any dtype)
    and part_lse hold the same queries over further keys. With w = sigmoid(part_lse - lse) the merged row is
    out + w (part_out - out) and its lse is log(exp(lse) + exp(part_lse)); neither form overflows.
    """
    weight = torch.sigmoid(part_lse - lse).transpose(1, 2).unsqueeze(-1)
    out.add_(weight * (part_out.to(out.dtype) - out))
    torch.logaddexp(lse, part_lse, out=lse)
