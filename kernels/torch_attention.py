"""Attention by torch's own fused operators, on the rectangles into which a mask is cut.

`torch_cpu` is torch's flash operator for the CPU, `cudnn` its operator of cuDNN. They support no mask and the causal
mask of a square; `mask.mask_rects` cuts any other mask into such rectangles, and the results are merged by their lse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .mask import Mask, MaskRect, mask_rects
from .merge import merge_

aten = torch.ops.aten


class Operator(NamedTuple):
    """One of torch's attention operators. Tensors are `[b, h, s, d]`; a bias `[s_q, s_k]` is added to the scores."""

    name: str
    """The name of its backend in `backends.BACKENDS`."""
    forward: Callable[[Tensor, Tensor, Tensor, bool, Tensor | None, float], tuple[Tensor, Tensor]]
    """(q, k, v, is_causal, bias, scale) -> out, lse `[b, h, s_q]` fp32."""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """(dout, q, k, v, out, lse, is_causal, bias, scale) -> dq, dk, dv."""
    takes_bands: bool
    """Whether it accepts a bias, which a "band" of `mask.mask_rects` needs."""


def forward(
    operator: Operator,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float,
    softcap: float,
    running: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Return out `[b, s_q, h_q, d]` and lse `[b, h_q, s_q]` as `attention.attention_forward` does.

    q is `[b, s_q, h_q, d]`, k and v are `[b, s_k, h_kv, d]`. Raises ValueError if the mask has a band (an attention
    window, for example) and the operator takes none.
    """
    assert softcap == 0, "choose_backend gives softcap to other backends"
    rects = _rects(operator, mask)
    if running is None and len(rects) == 1 and rects[0].rows == slice(0, q.shape[1]):
        return _forward_rect(operator, q, k, v, mask, scale, rects[0])  # the common case: nothing to merge
    if running is None:
        # Rows in no rectangle see no key and keep out 0, lse -inf.
        b, s, h, _ = q.shape
        wide = {"dtype": torch.promote_types(q.dtype, torch.float32), "device": q.device}
        out, lse = torch.zeros(q.shape, **wide), torch.full((b, h, s), -torch.inf, **wide)
    else:
        out, lse = running
    for rect in rects:
        part_out, part_lse = _forward_rect(operator, q, k, v, mask, scale, rect)
        rows = rect.rows
        merge_(out[:, rows], lse[:, :, rows], part_out.unsqueeze(0), part_lse.unsqueeze(0))  # views: merged in place
    return (out, lse) if running else (out.to(q.dtype), lse)


def backward(
    operator: Operator,
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

    dout, q, out are `[b, s_q, h_q, d]`, k, v `[b, s_k, h_kv, d]`, lse, delta `[b, h_q, s_q]`. Raises ValueError as
    `forward` does.
    """
    assert softcap == 0, "choose_backend gives softcap to other backends"
    if out is None:
        assert delta is not None
        out = carry_delta(dout, delta)
    # [b, s, h, d] -> [b, h, s, d], as views: additions to dq, dk, dv land in `into`.
    q, k, v, dout, out = (x.transpose(1, 2) for x in (q, k, v, dout, out))
    dq, dk, dv = (x.transpose(1, 2) for x in into)
    for rect in _rects(operator, mask):
        r, c = rect.rows, rect.keys
        bias = _bias(mask, rect, q.dtype) if rect.kind == "band" else None
        grads = operator.backward(
            dout[:, :, r], q[:, :, r], k[:, :, c], v[:, :, c], out[:, :, r], lse[:, :, r].contiguous(),
            rect.kind == "causal", bias, scale,
        )  # fmt: skip
        for total, grad in zip((dq[:, :, r], dk[:, :, c], dv[:, :, c]), grads, strict=True):
            total.add_(grad)


_RECTS = WeakTensorKeyDictionary()
"""Rectangles by `Mask.host_rows`: layers share a mask, and so do passes."""


def _rects(operator: Operator, mask: Mask) -> list[MaskRect]:
    if mask.host_rows not in _RECTS:
        _RECTS[mask.host_rows] = mask_rects(mask.host_rows)
    rects = _RECTS[mask.host_rows]
    if not operator.takes_bands and any(rect.kind == "band" for rect in rects):
        raise ValueError(
            f"attention backend = {operator.name!r}: cannot compute sliding windows or adjacent documents of one "
            'token; set backend = "triton" (in a recipe train.attention_backend)'
        )
    return rects


def _forward_rect(
    operator: Operator, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, rect: MaskRect
) -> tuple[Tensor, Tensor]:
    """Return out `[b, rows, h_q, d]` and lse `[b, h_q, rows]` of one rectangle."""
    q, k, v = (x.transpose(1, 2) for x in (q[:, rect.rows], k[:, rect.keys], v[:, rect.keys]))  # [b, h, s, d]
    bias = _bias(mask, rect, q.dtype) if rect.kind == "band" else None
    out, lse = operator.forward(q, k, v, rect.kind == "causal", bias, scale)
    return out.transpose(1, 2), lse


def _bias(mask: Mask, rect: MaskRect, dtype: torch.dtype) -> Tensor:
    """Return the bias that is added to the scores of a band, `[rows, keys]`: 0 for visible pairs, -inf for others."""
    keys = torch.arange(rect.keys.start, rect.keys.stop, device=mask.rows.device)
    start, stop = mask.rows[:, rect.rows].unsqueeze(-1)
    hidden = (keys < start) | (keys >= stop)
    return torch.zeros(hidden.shape, dtype=dtype, device=keys.device).masked_fill_(hidden, -torch.inf)


def carry_delta(dout: Tensor, delta: Tensor) -> Tensor:
    """Return an `out` `[..., s, h, d]` with rowsum(dout * out) = delta `[..., h, s]`, for dout `[..., s, h, d]`.

    These operators compute delta from out, but a rank that holds another rank's queries received delta alone, one
    number in place of d. Each row of the result is 0 except at the largest element of dout. The quotient there is at
    most d * max|out|, so it neither overflows nor loses more than one rounding.
    """
    index = dout.abs().argmax(-1, keepdim=True)  # [..., s, h, 1]
    largest = dout.gather(-1, index)
    quotient = torch.where(largest == 0, 0, delta.transpose(-1, -2).unsqueeze(-1) / largest)
    return torch.zeros_like(dout).scatter_(-1, index, quotient.to(dout.dtype))


def _cpu_forward(q, k, v, is_causal, bias, scale):
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale)


def _cpu_backward(dout, q, k, v, out, lse, is_causal, bias, scale):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, is_causal, attn_mask=bias, scale=scale
    )


def _cudnn_forward(q, k, v, is_causal, bias, scale):
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, is_causal, scale=scale)
    return out, lse.reshape(q.shape[:3])  # [b, h, s, 1] -> [b, h, s]


def _cudnn_backward(dout, q, k, v, out, lse, is_causal, bias, scale):
    state = torch.zeros((), dtype=torch.int64, device=q.device)
    return aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse.unsqueeze(-1), state, state, None, None, None, q.shape[2], k.shape[2], 0.0, is_causal,
        scale=scale,
    )  # fmt: skip


CPU = Operator("torch_cpu", _cpu_forward, _cpu_backward, takes_bands=True)
CUDNN = Operator("cudnn", _cudnn_forward, _cudnn_backward, takes_bands=False)
