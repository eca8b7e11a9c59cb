"""Context-parallel attention as a differentiable function, for the model."""

from __future__ import annotations

import torch
from torch import Tensor

from .execute import AttentionSpec, backward, forward
from .group import CpGroup
from .transports import between_processes


def context_attention(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, group: CpGroup, *, scale: float | None = None
) -> Tensor:
    """Compute self-attention over the sequence that the ranks of `group` hold together. Collective.

    q `[b, s, h_q, d]` and k, v `[b, s, h_kv, d]` are this rank's tokens, in the order of `spec.layouts[group.rank]`;
    returns out, like q. Scores are q k `scale` (default: d^-1/2). Differentiable in q, k and v. All ranks pass the same
    b, h_q, h_kv, d and scale. Raises ValueError if the grid cannot divide the heads or s is not the layout's, and
    PeerError if another rank is gone or does not answer.
    """
    layout = spec.layouts[group.rank]
    if q.shape[1] != layout.num_tokens:
        raise ValueError(
            f"context_attention: q.shape[1] = {q.shape[1]} on rank {group.rank}: its layout has {layout.num_tokens} "
            f"tokens; pass the tokens of spec.layouts[{group.rank}]"
        )
    unfit = spec.grid.unfit(q.shape[2], k.shape[2])
    if unfit is not None:
        raise ValueError(f"context_attention: grid = {spec.grid}: {unfit}; choose a grid whose heads fit")
    # Messages cannot be traced: torch.compile breaks its graph here.
    return torch.compiler.disable(_ContextAttention.apply)(q, k, v, spec, group, scale)  # type: ignore[return-value]


class _ContextAttention(torch.autograd.Function):
    """Both passes of this rank, each driven over a transport of its own."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, group: CpGroup, scale: float | None
    ) -> Tensor:
        transport = between_processes(group)
        out, saved = transport.drive(forward(spec, group.rank, q, k, v, transport, scale=scale))
        ctx.save_for_backward(*saved)  # tensors of this rank's grid position only
        ctx.spec, ctx.group, ctx.num_kv_heads, ctx.scale = spec, group, k.shape[2], scale
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):  # type: ignore[override]
        transport = between_processes(ctx.group)
        running = backward(
            ctx.spec, ctx.group.rank, dout, ctx.saved_tensors, ctx.num_kv_heads, transport, scale=ctx.scale
        )
        return *transport.drive(running), None, None, None  # none for spec, group and scale
