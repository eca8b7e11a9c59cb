"""Attention written out: the oracle of tests and benchmarks, and the backend of last resort.

Computes in fp32 at least (fp64 stays fp64) and holds all s_q x s_k scores of a tile: for small shapes only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .mask import Mask
from .merge import merge_


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float, running: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """See `attention.attention_forward`. Differentiable by autograd where nothing is running."""
    q, k, v, dtype = *(_wide(x) for x in (q, k, v)), q.dtype
    scores, _ = _scores(q, k, mask, scale, softcap)
    lse = scores.logsumexp(-1)
    # A row that sees no key has lse -inf; its probabilities are 0, not the nan of -inf - -inf.
    p = (scores - lse.masked_fill(lse.isinf(), 0).unsqueeze(-1)).exp()
    out = torch.einsum("bhqk,bkhd->bqhd", p, _expand(v, q))
    if running is None:
        return out.to(dtype), lse
    merge_(*running, out.unsqueeze(0), lse.unsqueeze(0))
    return running


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    delta: Tensor | None,
    mask: Mask,
    scale: float,
    softcap: float,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:
    """See `attention.attention_backward`."""
    dout, q, k, v = (_wide(x) for x in (dout, q, k, v))
    if delta is None:
        assert out is not None
        delta = (dout * _wide(out)).sum(-1).transpose(1, 2)
    scores, slope = _scores(q, k, mask, scale, softcap)
    p = (scores - lse.masked_fill(lse.isinf(), 0).unsqueeze(-1)).exp()
    dp = torch.einsum("bqhd,bkhd->bhqk", dout, _expand(v, q))
    ds = p * (dp - delta.unsqueeze(-1)) * slope * scale
    dq, dk, dv = into
    groups = (k.shape[2], q.shape[2] // k.shape[2])  # the gradient of a kv head is the sum over its query heads
    dq.add_(torch.einsum("bhqk,bkhd->bqhd", ds, _expand(k, q)))
    dk.add_(torch.einsum("bhqk,bqhd->bkhd", ds, q).unflatten(2, groups).sum(3))
    dv.add_(torch.einsum("bhqk,bqhd->bkhd", p, dout).unflatten(2, groups).sum(3))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _expand(k: Tensor, q: Tensor) -> Tensor:
    return k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)


def _scores(q: Tensor, k: Tensor, mask: Mask, scale: float, softcap: float) -> tuple[Tensor, Tensor | float]:
    """Masked scores `[b, h, s_q, s_k]`, and their derivative by the product q k scale."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, _expand(k, q)) * scale
    slope: Tensor | float = 1.0
    if softcap > 0:
        capped = torch.tanh(scores / softcap)
        scores, slope = softcap * capped, 1 - capped.square()
    keys = torch.arange(k.shape[1], device=k.device)
    start, stop = mask.rows.unsqueeze(-1)
    return scores.masked_fill((keys < start) | (keys >= stop), float("-inf")), slope
