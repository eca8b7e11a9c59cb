"""FlashAttention-3, if it is installed (sm_90)."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from .case import Case, unfit_nvidia
from .packages import unfit_package
from .torch_attention import carry_delta
from .varlen import Call, Kernel

DISTRIBUTION, MODULE = "flash-attn-3", "flash_attn_interface"
_COMMON = (
    *("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale"),
    *("window_size_left", "window_size_right", "softcap"),
)
FUNCTIONS = (
    ("_flash_attn_forward", (*_COMMON, "causal")),
    ("_flash_attn_backward", (*_COMMON, "dout", "out", "softmax_lse", "dq", "dk", "dv", "is_causal", "deterministic")),
)
"""Functions of the module that are called, which are private, each with the parameters that are passed."""


def unfit(case: Case) -> str | None:
    """Return why FlashAttention-3 cannot compute a case, or None."""
    if (reason := unfit_nvidia(case, least=90, largest_head_dim=256, softcap=True)) is not None:
        return reason
    if case.arch != "sm_90":
        return f"runs on sm_90, not on {case.arch}"
    return unfit_package(DISTRIBUTION, MODULE, FUNCTIONS)


def _forward(q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = importlib.import_module(MODULE)._flash_attn_forward(
        q, k, v, softmax_scale=scale, causal=call.is_causal, softcap=softcap, **_band_arguments(call)
    )
    return out, lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor, delta: Tensor | None, call: Call,
    scale: float, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if out is None:
        assert delta is not None
        out = carry_delta(dout, delta)  # it takes no gradient of lse
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    importlib.import_module(MODULE)._flash_attn_backward(
        dout=dout, q=q, k=k, v=v, out=out, softmax_lse=lse, dq=dq, dk=dk, dv=dv, softmax_scale=scale,
        is_causal=call.is_causal, softcap=softcap, deterministic=torch.are_deterministic_algorithms_enabled(),
        **_band_arguments(call),
    )  # fmt: skip
    return dq, dk, dv


def _band_arguments(call: Call) -> dict[str, Any]:
    """Return the arguments that describe the bands of a call."""
    left, right = call.windows
    found: dict[str, Any] = {"window_size_left": left, "window_size_right": right}
    if call.query_starts is not None:
        found |= {"cu_seqlens_q": call.query_starts, "cu_seqlens_k": call.key_starts}
        found |= {"max_seqlen_q": call.most_queries, "max_seqlen_k": call.most_keys}
    return found


KERNEL = Kernel(_forward, _backward)
