"""Attention from its definition, with one boolean for each pair: the exact result, and torch's in a given dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from longring.kernels.layout import SeqLayout
from torch import Tensor


def visible_pairs(queries: SeqLayout, keys: SeqLayout, causal: bool = True, window: int | None = None) -> torch.Tensor:
    """Return the visible pairs, bool [s_q, s_k]: same document, not after the query, fewer than `window` before it."""
    q_positions = [p for start, stop in queries.runs for p in range(start, stop)]
    k_positions = [p for start, stop in keys.runs for p in range(start, stop)]

    def document(position: int) -> int:
        return sum(start <= position for start in queries.document_starts)

    return torch.tensor(
        [
            [
                document(i) == document(j) and (not causal or j <= i) and (window is None or i - j < window)
                for j in k_positions
            ]
            for i in q_positions
        ]
    )


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None = None, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return out and lse in fp64, differentiable. A row without visible keys has out 0 and lse -inf."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    sees = visible.any(1)
    weights = torch.zeros_like(scores)
    weights[:, :, sees] = scores[:, :, sees].masked_fill(~visible[sees], -torch.inf).softmax(-1)
    lse = scores.masked_fill(~visible, -torch.inf).logsumexp(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse


def torch_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None = None, softcap: float = 0.0
) -> Tensor:
    """Return torch's attention in the dtype of the inputs; with a softcap, which torch lacks, it is written out."""
    sees = visible.any(1)
    visible = torch.where(
        sees[:, None], visible, True
    )  # torch's softmax over no keys is nan; these rows are set to 0 below
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if softcap:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = softcap * torch.tanh(scores / softcap)
        out = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True)
    return out.transpose(1, 2) * sees[None, :, None, None]


def torch_lse(q: Tensor, k: Tensor, visible: Tensor, scale: float | None = None) -> Tensor:
    """Return lse [b, h, s] in fp32, of scores in the dtype of the inputs."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~visible, -torch.inf).logsumexp(-1)


def answers(
    qkv: list[Tensor], dout: Tensor, visible: Tensor, scale: float | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return out, lse, dq, dk and dv twice: of plain torch in the dtype of the inputs, and exact in fp64."""
    found = []
    for dtype, exact in ((qkv[0].dtype, False), (torch.float64, True)):
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in qkv)
        if exact:
            out, lse = exact_attention(q, k, v, visible, scale)
        else:
            out, lse = torch_attention(q, k, v, visible, scale), torch_lse(q, k, visible, scale)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout.to(dtype))
        found.append({"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv})
    return found[0], found[1]
