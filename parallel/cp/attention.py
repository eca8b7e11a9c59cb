"""Attention over a sequence that several ranks hold, as the model sees it."""

from __future__ import annotations

import torch
from torch import Tensor

from .execute import Problem, backward, forward
from .group import CpGroup
from .transports import Distributed


def context_attention(q: Tensor, k: Tensor, v: Tensor, problem: Problem, group: CpGroup) -> Tensor:
    """Self-attention over the sequence that the group's ranks hold together -> out like q; differentiable.

    q `[b, s, h_q, d]` and k, v `[b, s, h_kv, d]` are this rank's share, in the order of `problem.layouts[group.rank]`.
    Collective: every rank of the group calls it, with shapes alike but for s. Raises ValueError for heads that the
    grid cannot divide and for a share that is not the layout's, and PeerError when another rank is dead or late.
    """
    layout = problem.layouts[group.rank]
    if q.shape[1] != layout.num_tokens:
        raise ValueError(
            f"context parallelism: rank {group.rank} of {group.size} holds {q.shape[1]} tokens, its layout "
            f"{layout.num_tokens}"
        )
    unfit = problem.grid.unfit(q.shape[2], k.shape[2])
    if unfit is not None:
        raise ValueError(f"context parallelism: {problem.grid}: {unfit}")
    # Its messages are no graph: torch.compile breaks here and goes on after.
    return torch.compiler.disable(_ContextAttention.apply)(q, k, v, problem, group)  # type: ignore[return-value]


class _ContextAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, problem: Problem, group: CpGroup) -> Tensor:  # type: ignore[override]
        transport = Distributed(group)
        out, saved = transport.drive(forward(problem, group.rank, q, k, v, transport))
        ctx.save_for_backward(*saved)
        ctx.problem, ctx.group, ctx.num_kv_heads = problem, group, k.shape[2]
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):  # type: ignore[override]
        transport = Distributed(ctx.group)
        work = backward(ctx.problem, ctx.group.rank, dout, ctx.saved_tensors, ctx.num_kv_heads, transport)
        return *transport.drive(work), None, None
