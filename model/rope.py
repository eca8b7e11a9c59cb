"""The angles of the rotary position embedding (RoPE; RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each `[s, head_dim / 2]` fp32, for int64 positions `[s]`.

    Angles are computed in fp64: at position 10^6 an fp32 product is off by 0.06 radians.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions.double()[:, None] * base**-exponents  # [s, 1] * [head_dim / 2]
    return angles.cos().float(), angles.sin().float()
