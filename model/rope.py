"""Rotary position embedding (RoFormer, arXiv 2104.09864), dims paired as (i, i + d/2) like Llama's."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin `[s, head_dim / 2]` fp32 for int64 positions `[s]`.

    Angles are formed in fp64: at position 10^6 an fp32 product is already off by 0.06 radians.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions.double()[:, None] * base**-exponents
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of dims of x `[b, s, h, d]` by its position's angle; computed in fp32, returned in x's dtype."""
    cos, sin = (t[None, :, None, :] for t in table)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
