"""FlashAttention-4 (flash-attn-4), which compiles its kernels when they are first called."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from .case import Case, unfit_nvidia
from .packages import unfit_package
from .varlen import Call, Kernel

DISTRIBUTION, MODULE = "flash-attn-4", "flash_attn.cute.interface"
_COMMON = (
    *("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal"),
    *("window_size_left", "window_size_right", "softcap"),
)
FUNCTIONS = (
    ("_flash_attn_fwd", (*_COMMON, "return_lse")),
    ("_flash_attn_bwd", (*_COMMON, "out", "dout", "lse", "dlse", "deterministic")),
)
"""Functions of the module that are called, which are private, each with the parameters that are passed."""


def unfit(case: Case) -> str | None:
    """Return why FlashAttention-4 cannot compute a case, or None."""
    # Its forward runs on sm_80 too, its backward does not.
    if (reason := unfit_nvidia(case, least=90, largest_head_dim=256, softcap=True)) is not None:
        return reason
    if case.arch != "sm_90" and case.head_dim > 128:
        return "head dims above 128 on sm_90 only: elsewhere its backward takes no gradient of lse"
    if case.deterministic and case.arch.startswith("sm_12"):
        return f"its backward has no fixed order of sums on {case.arch}"
    return unfit_package(DISTRIBUTION, MODULE, FUNCTIONS)


def _forward(q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    found = importlib.import_module(MODULE)._flash_attn_fwd(
        q, k, v, softmax_scale=scale, softcap=softcap, return_lse=True, **_band_arguments(call)
    )
    return found[0], found[1]  # versions differ in what follows


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor, delta: Tensor | None, call: Call,
    scale: float, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # It subtracts rowsum(dout * out) - dlse from each dp: with out = 0 and dlse = -delta exactly delta.
    dlse = None
    if out is None:
        assert delta is not None
        out, dlse = torch.zeros_like(dout), -delta
    dq, dk, dv, *_ = importlib.import_module(MODULE)._flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=scale, softcap=softcap, dlse=dlse,
        deterministic=torch.are_deterministic_algorithms_enabled(), **_band_arguments(call),
    )  # fmt: skip
    return dq, dk, dv


def _band_arguments(call: Call) -> dict[str, Any]:
    """Return the arguments that describe the bands of a call."""
    found: dict[str, Any] = {"causal": call.is_causal}
    if not call.is_causal:
        found |= {"window_size_left": call.left, "window_size_right": call.right}
    if call.query_starts is not None:
        found |= {"cu_seqlens_q": call.query_starts, "cu_seqlens_k": call.key_starts}
        found |= {"max_seqlen_q": call.most_queries, "max_seqlen_k": call.most_keys}
    return found


KERNEL = Kernel(_forward, _backward)
