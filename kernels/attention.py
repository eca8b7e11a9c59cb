"""Attention of one tile (queries, keys): the front door, with the plain reference beside it.

Shapes: q, out `[b, s_q, h_q, d]`; k, v `[b, s_k, h_kv, d]` with h_q a multiple of h_kv (grouped-query attention);
lse, delta `[b, h_q, s_q]` fp32. lse is the natural logarithm of the sum of exp(scaled scores); with it, results
over parts of the keys can be merged exactly, and a backward can rebuild the probabilities of any tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import SeqLayout, causal_relation


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, q_layout: SeqLayout, k_layout: SeqLayout
) -> tuple[Tensor, Tensor]:
    """Causal attention written out, in the dtype of its inputs: the oracle of tests, differentiable by autograd.

    Every query must see at least one key. Holds all s_q x s_k scores: for small shapes only.
    """
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    visible = k_layout.positions(k.device)[None, :] <= q_layout.positions(q.device)[:, None]
    scores = scores.masked_fill(~visible, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, q_layout: SeqLayout, k_layout: SeqLayout
) -> tuple[Tensor, Tensor]:
    """Causal attention (by position) of one tile -> out in q's dtype, lse.

    The tile is wholly visible or a diagonal one (`causal_relation`); anything else raises ValueError.
    """
    is_causal = _is_diagonal(q, k, v, q_layout, k_layout)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cuda":
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)
    return out.transpose(1, 2), lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    q_layout: SeqLayout,
    k_layout: SeqLayout,
    *,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Add one tile's gradients into the fp32 buffers `into` = (dq, dk, dv), shaped like q, k, v.

    lse and `delta` = rowsum(dout * out) belong to the *whole* row, over all keys, so each tile's share is exact and
    the shares just add (FlashAttention-2, arXiv 2307.08691, algorithm 2).
    """
    is_causal = _is_diagonal(q, k, v, q_layout, k_layout)
    q, k, v, dout = (x.transpose(1, 2) for x in (q, k, v, dout))
    out = _carry_delta(dout, delta)
    if q.device.type == "cuda":
        # Without dropout the random state is not read; shapes with no cumulative lengths say "not packed".
        state = torch.empty(2, dtype=torch.uint64, device=q.device)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, is_causal, state, state[:0]
        )
    else:
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, is_causal
        )
    for total, grad in zip(into, grads, strict=True):
        total.add_(grad.transpose(1, 2))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, layout: SeqLayout) -> Tensor:  # type: ignore[override]
        out, lse = attention_forward(q, k, v, layout, layout)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout = layout
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        into = (zeros_fp32(q), zeros_fp32(k), zeros_fp32(v))
        attention_backward(dout, q, k, v, lse, row_delta(dout, out), ctx.layout, ctx.layout, into=into)
        return *(total.to(x.dtype) for total, x in zip(into, (q, k, v), strict=True)), None


def attention(q: Tensor, k: Tensor, v: Tensor, layout: SeqLayout) -> Tensor:
    """Causal self-attention of sequences that lie whole on this rank -> out `[b, s, h_q, d]`; differentiable."""
    return _Attention.apply(q, k, v, layout)  # type: ignore[return-value]


def row_delta(dout: Tensor, out: Tensor) -> Tensor:
    """rowsum(dout * out) -> `[b, h, s]`, fp32 (fp64 stays fp64): what the softmax's backward takes off each row."""
    wide = torch.promote_types(dout.dtype, torch.float32)
    return (dout.to(wide) * out.to(wide)).sum(-1).transpose(1, 2)


def zeros_fp32(like: Tensor) -> Tensor:
    """An accumulator in fp32 of the given shape (fp64 stays fp64, for tests)."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def _is_diagonal(q: Tensor, k: Tensor, v: Tensor, q_layout: SeqLayout, k_layout: SeqLayout) -> bool:
    if q.shape[1] != q_layout.num_tokens or k.shape[1] != k_layout.num_tokens or k.shape != v.shape:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit layouts of "
            f"{q_layout.num_tokens} queries and {k_layout.num_tokens} keys"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {q.shape[2]} query heads are not a multiple of {k.shape[2]} kv heads")
    relation = causal_relation(q_layout, k_layout)
    if relation == "none":
        raise ValueError(f"attention: no query of {q_layout.runs} may see a key of {k_layout.runs}")
    return relation == "causal"


def _carry_delta(dout: Tensor, delta: Tensor) -> Tensor:
    """An `out` `[b, h, s, d]` with rowsum(dout * out) = delta: all of it in the place of dout's largest element.

    torch's operators take out and sum it up themselves; a rank that holds another's queries was sent delta alone,
    one number for d. The quotient is at most d * max|out|, so it neither overflows nor loses more than one rounding.
    """
    place = dout.abs().argmax(-1, keepdim=True)
    largest = dout.gather(-1, place)
    quotient = torch.where(largest == 0, 0, delta.unsqueeze(-1) / largest)
    return torch.zeros_like(dout).scatter_(-1, place, quotient.to(dout.dtype))
