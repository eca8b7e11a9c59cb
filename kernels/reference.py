"""Attention by its definition: the oracle of tests and benchmarks, and the backend of last resort.

It computes in fp32 (fp64 stays fp64) and holds all s_q x s_k scores of a tile, so it serves small shapes only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .mask import Mask
from .merge import merge_

# On CPUs torch's elementwise functions are MKL's, which chooses the code of each in its first call. Threads that race
# for it may get one of few digits (github.com/pytorch/pytorch/issues/188792), so one thread makes the first calls. This
# module is imported wherever models are computed: RoPE takes sin and cos, AdamW sqrt.
for _dtype in (torch.float32, torch.float64):
    for _function in (torch.exp, torch.log, torch.tanh, torch.sqrt, torch.sin, torch.cos):
        _function(torch.ones(1, dtype=_dtype))


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float, running: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Return out `[b, s_q, h_q, d]` and lse `[b, h_q, s_q]` as `attention.attention_forward` does.

    q is `[b, s_q, h_q, d]`, k and v are `[b, s_k, h_kv, d]`. Autograd can differentiate it if `running` is None.
    """
    q, k, v, dtype = *(_wide(x) for x in (q, k, v)), q.dtype
    scores, _ = _scores(q, k, mask, scale, softcap)
    lse = scores.logsumexp(-1)
    # A row that sees no key has lse -inf: 0 in its stead gives probabilities of 0, not the nan of -inf - -inf.
    p = (scores - lse.masked_fill(lse.isinf(), 0).unsqueeze(-1)).exp()
    out = torch.einsum("bhqk,bkhd->bqhd", p, _expand(v, q))  # [b, s_q, h_q, d]
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
    """Add dq, dk, dv to the buffers `into`, shaped like q, k, v, as `attention.attention_backward` does.

    dout, q, out are `[b, s_q, h_q, d]`, k, v `[b, s_k, h_kv, d]`, lse, delta `[b, h_q, s_q]`.
    """
    dout, q, k, v = (_wide(x) for x in (dout, q, k, v))
    if delta is None:
        assert out is not None
        delta = (dout * _wide(out)).sum(-1).transpose(1, 2)  # [b, s_q, h] -> [b, h, s_q]
    scores, slope = _scores(q, k, mask, scale, softcap)
    p = (scores - lse.masked_fill(lse.isinf(), 0).unsqueeze(-1)).exp()
    dp = torch.einsum("bqhd,bkhd->bhqk", dout, _expand(v, q))
    ds = p * (dp - delta.unsqueeze(-1)) * slope * scale  # [b, h_q, s_q, s_k]
    dq, dk, dv = into
    # The gradient of a kv head is the sum over the query heads of its group: [.., h_q, d] -> [.., h_kv, group, d].
    groups = (k.shape[2], q.shape[2] // k.shape[2])
    dq.add_(torch.einsum("bhqk,bkhd->bqhd", ds, _expand(k, q)))
    dk.add_(torch.einsum("bhqk,bqhd->bkhd", ds, q).unflatten(2, groups).sum(3))
    dv.add_(torch.einsum("bhqk,bqhd->bkhd", p, dout).unflatten(2, groups).sum(3))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _expand(k: Tensor, q: Tensor) -> Tensor:
    return k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)  # [b, s_k, h_kv, d] -> [b, s_k, h_q, d]


def _scores(q: Tensor, k: Tensor, mask: Mask, scale: float, softcap: float) -> tuple[Tensor, Tensor | float]:
    """Return the masked scores `[b, h_q, s_q, s_k]` and their derivative with respect to q k scale, same shape or 1."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, _expand(k, q)) * scale
    slope: Tensor | float = 1.0
    if softcap > 0:
        capped = torch.tanh(scores / softcap)
        scores, slope = softcap * capped, 1 - capped.square()
    keys = torch.arange(k.shape[1], device=k.device)
    start, stop = mask.rows.unsqueeze(-1)  # each [s_q, 1], against keys [s_k]
    return scores.masked_fill((keys < start) | (keys >= stop), float("-inf")), slope
