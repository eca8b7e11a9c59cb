"""The angles of the rotary position embedding (RoPE; RoFormer, arXiv 2104.09864), scaled for long contexts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import UNSCALED, RopeScaling


def rope_table(positions: Tensor, head_dim: int, base: float, scaling: RopeScaling = UNSCALED) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each `[s, head_dim / 2]` fp32, for int64 positions `[s]`; yarn multiplies both by a factor.

    Angles are computed in fp64: at position 10^6 an fp32 product is off by 0.06 radians.
    """
    angles = positions.double()[:, None] * frequencies(head_dim, base, scaling, positions.device)  # [s, head_dim / 2]
    factor = 1.0
    if scaling.kind == "yarn":
        factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


def frequencies(head_dim: int, base: float, scaling: RopeScaling, device: torch.device | str | None = None) -> Tensor:
    """Return the angle by which each pair of dims turns from one position to the next, fp64 `[head_dim / 2]`."""
    if scaling.kind == "ntk":
        base *= scaling.factor ** (head_dim / (head_dim - 2))
    index = torch.arange(head_dim // 2, dtype=torch.float64, device=device)
    plain = base ** (-2 * index / head_dim)
    # `kept` is 1 where a frequency stays, and 0 where it is divided by the factor.
    if scaling.kind == "linear":
        kept = torch.zeros_like(plain)
    elif scaling.kind == "llama3":
        turns = scaling.original_tokens * plain / (2 * math.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    elif scaling.kind == "yarn":
        first, last = (_index_of(turns, head_dim, base, scaling) for turns in (scaling.beta_fast, scaling.beta_slow))
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        kept = 1 - ((index - first) / (last - first or 0.001)).clamp(0, 1)  # 0.001: the published code's, for a step
    else:
        return plain
    return plain * (kept + (1 - kept) / scaling.factor)


def _index_of(turns: float, head_dim: int, base: float, scaling: RopeScaling) -> float:
    """Return the index, not an integer, of the frequency that makes `turns` turns in the original context."""
    return head_dim * math.log(scaling.original_tokens / (2 * math.pi * turns)) / (2 * math.log(base))
