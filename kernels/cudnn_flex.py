"""cuDNN's FlexAttention (nvidia-cudnn-frontend): its mask is a run of keys for each query, as ours.

It makes a plan of a mask, which all layers and passes share, and compiles its kernels when they are first called.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .case import Case, addressable, unfit_nvidia
from .mask import Mask
from .merge import merge_
from .packages import unfit_package
from .varlen import some_see_nothing

DISTRIBUTION = "nvidia-cudnn-frontend"
PLANS, EXECUTION = "cudnn.flex_attention", "cudnn.flex_attention.execution"
_TENSORS = ("q_tensor", "k_tensor", "v_tensor")
PLAN_FUNCTIONS = (("create_mask_plan", ("mask_func", "q", "k", "v", "build_backward")),)
"""Functions of `PLANS` that are called, each with the parameters that are passed."""
_OF_BACKWARD = ("o_tensor", "do_tensor", "lse_tensor", "mask_plan", "softmax_scale", "deterministic", "dlse_tensor")
FUNCTIONS = (
    ("_flex_attention_forward", (*_TENSORS, "mask_plan", "softmax_scale", "return_lse")),
    ("_flex_attention_backward", (*_TENSORS, *_OF_BACKWARD)),
)
"""Functions of `EXECUTION` that are called, which are private, as `PLAN_FUNCTIONS`."""
ARCHITECTURES = ("sm_90", "sm_100", "sm_103")


def unfit(case: Case) -> str | None:
    """Return why cuDNN's FlexAttention cannot compute a case, or None."""
    if (reason := unfit_nvidia(case, least=90, largest_head_dim=256)) is not None:
        return reason
    if case.arch not in ARCHITECTURES:
        return f"runs on {', '.join(ARCHITECTURES)}, not on {case.arch}"
    if 128 < case.head_dim < 256:
        return "head dims up to 128, and 256"
    return unfit_package(DISTRIBUTION, PLANS, PLAN_FUNCTIONS) or unfit_package(DISTRIBUTION, EXECUTION, FUNCTIONS)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float, running: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Return out `[b, s_q, h_q, d]` and lse `[b, h_q, s_q]` as `attention.attention_forward` does.

    q is `[b, s_q, h_q, d]`, k and v are `[b, s_k, h_kv, d]`.
    """
    assert softcap == 0, "choose_backend gives softcap to other backends"
    q, k, v = (addressable(x) for x in (q, k, v))
    out, lse, *_ = importlib.import_module(EXECUTION)._flex_attention_forward(
        q, k, v, mask_plan=_plan(q, k, v, mask), softmax_scale=scale, return_lse=True
    )
    if some_see_nothing(mask):  # what it leaves in their rows is not documented
        unseeing = mask.rows[0] >= mask.rows[1]
        out, lse = out.masked_fill(unseeing[:, None, None], 0), lse.masked_fill(unseeing, -torch.inf)
    if running is None:
        return out, lse
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
    """Add dq, dk, dv to the buffers `into`, shaped like q, k, v, or write them, as `attention.attention_backward` does.

    dout, q, out are `[b, s_q, h_q, d]`, k, v `[b, s_k, h_kv, d]`, lse, delta `[b, h_q, s_q]`.
    """
    assert softcap == 0, "choose_backend gives softcap to other backends"
    dout, q, k, v = (addressable(x) for x in (dout, q, k, v))
    # It subtracts rowsum(dout * out) - dlse from each dp: with out = 0 and dlse = -delta exactly delta.
    dlse = None
    if out is None:
        assert delta is not None
        out, dlse = torch.zeros_like(dout), -delta.contiguous()
    if some_see_nothing(mask):
        lse = lse.masked_fill(lse.isneginf(), 0)  # -inf - -inf would be nan; these rows have probabilities of 0
    grads = importlib.import_module(EXECUTION)._flex_attention_backward(
        q, k, v, addressable(out), dout, lse.contiguous(), mask_plan=_plan(q, k, v, mask), softmax_scale=scale,
        deterministic=torch.are_deterministic_algorithms_enabled(), dlse_tensor=dlse,
    )  # fmt: skip
    for total, grad in zip(into, grads, strict=True):
        total.add_(grad) if total.itemsize > 2 else total.copy_(grad)


_PLANS = WeakTensorKeyDictionary()
"""Plans by `Mask.host_rows`, and then by the sizes of q and k and their dtype."""


def _plan(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Any:
    """Return the plan of a mask for inputs of these sizes; made once, with what the backward needs."""
    if mask.host_rows not in _PLANS:
        _PLANS[mask.host_rows] = {}
    plans, key = _PLANS[mask.host_rows], (q.shape, k.shape, q.dtype, q.device)
    if key not in plans:
        # Visible are the keys [0, F0) and [F1, F2) of functions [heads or 1, 3, b s_q]: F0 = 0, and our interval. That
        # keys are counted from 0 in each sequence, not through the batch, is not documented; `choose` checks it.
        functions = torch.cat([torch.zeros_like(mask.rows[:1]), mask.rows]).repeat(1, len(q)).unsqueeze(0).contiguous()
        module = importlib.import_module(PLANS)
        plans[key] = module.create_mask_plan(functions, q, k, v, build_backward=True)
    return plans[key]
