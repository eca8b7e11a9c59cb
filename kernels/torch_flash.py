"""FlashAttention-2 as torch carries it: its operators with attention windows and packed bands."""

from __future__ import annotations

import torch
from torch import Tensor

from .case import Case, unfit_nvidia
from .torch_attention import carry_delta
from .varlen import Call, Kernel

aten = torch.ops.aten


def unfit(case: Case) -> str | None:
    """Return why the operators cannot compute a case, or None."""
    return unfit_nvidia(case, least=80, largest_head_dim=256)


def _forward(q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    assert softcap == 0, "choose_backend gives softcap to other backends"
    left, right = call.windows
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, call.query_starts, call.key_starts, *_most(q, k, call), 0.0, call.is_causal, False,
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return out, lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor, delta: Tensor | None, call: Call,
    scale: float, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    assert softcap == 0, "choose_backend gives softcap to other backends"
    if out is None:
        assert delta is not None
        out = carry_delta(dout, delta)
    left, right = call.windows
    state = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout: not read without it
    return aten._flash_attention_backward(
        dout, q, k, v, out, lse, call.query_starts, call.key_starts, *_most(q, k, call), 0.0, call.is_causal,
        state, state[:0], scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip


def _most(q: Tensor, k: Tensor, call: Call) -> tuple[int, int]:
    """Return the queries and keys of the longest band."""
    return (q.shape[1], k.shape[1]) if call.query_starts is None else (call.most_queries, call.most_keys)


KERNEL = Kernel(_forward, _backward)
