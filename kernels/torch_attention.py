"""torch's own fused attention operators, on the rectangles a mask is made of.

`torch_cpu` is torch's flash operator for the CPU, `flash` and `cudnn` are those for CUDA. They know two masks, none and
the lower triangle of a square; `mask.mask_rects` cuts any other into such, and the results merge by their lse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .mask import Mask, MaskRect, mask_rects
from .merge import merge_

aten = torch.ops.aten


class Operator(NamedTuple):
    """One of torch's operators; tensors are `[b, h, s, d]`, a bias `[s_q, s_k]` is added to the scores."""

    forward: Callable[[Tensor, Tensor, Tensor, bool, Tensor | None, float], tuple[Tensor, Tensor]]
    """(q, k, v, is_causal, bias, scale) -> out, lse `[b, h, s_q]` fp32."""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """(dout, q, k, v, out, lse, is_causal, bias, scale) -> dq, dk, dv."""
    takes_bands: bool


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
    """See `attention.attention_forward`."""
    assert softcap == 0, "the table of backends sends softcap elsewhere"
    parts = _rects(operator, mask)
    if running is None and len(parts) == 1 and parts[0].rows == slice(0, q.shape[1]):
        return _forward_rect(operator, q, k, v, mask, scale, parts[0])
    if running is None:
        # Rows in no rectangle see no key: out 0, lse -inf.
        b, s, h, _ = q.shape
        wide = {"dtype": torch.promote_types(q.dtype, torch.float32), "device": q.device}
        out, lse = torch.zeros(q.shape, **wide), torch.full((b, h, s), -torch.inf, **wide)
    else:
        out, lse = running
    for rect in parts:
        part_out, part_lse = _forward_rect(operator, q, k, v, mask, scale, rect)
        rows = rect.rows
        merge_(out[:, rows], lse[:, :, rows], part_out.unsqueeze(0), part_lse.unsqueeze(0))
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
    """See `attention.attention_backward`."""
    assert softcap == 0, "the table of backends sends softcap elsewhere"
    if out is None:
        assert delta is not None
        out = _carry_delta(dout, delta)
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


def _rects(operator: Operator, mask: Mask) -> list[MaskRect]:
    found = mask_rects(mask.host_rows)
    if not operator.takes_bands and any(rect.kind == "band" for rect in found):
        raise ValueError(
            "attention: torch's operators for CUDA take no mask of which both edges move from row to row (a sliding "
            "window, documents of one token side by side); use backend = 'triton'"
        )
    return found


def _forward_rect(
    operator: Operator, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, rect: MaskRect
) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q[:, rect.rows], k[:, rect.keys], v[:, rect.keys]))
    bias = _bias(mask, rect, q.dtype) if rect.kind == "band" else None
    out, lse = operator.forward(q, k, v, rect.kind == "causal", bias, scale)
    return out.transpose(1, 2), lse


def _bias(mask: Mask, rect: MaskRect, dtype: torch.dtype) -> Tensor:
    keys = torch.arange(rect.keys.start, rect.keys.stop, device=mask.rows.device)
    start, stop = mask.rows[:, rect.rows].unsqueeze(-1)
    hidden = (keys < start) | (keys >= stop)
    return torch.zeros(hidden.shape, dtype=dtype, device=keys.device).masked_fill_(hidden, -torch.inf)


def _carry_delta(dout: Tensor, delta: Tensor) -> Tensor:
    """An `out` `[b, s, h, d]` with rowsum(dout * out) = delta: all of it in the place of dout's largest element.

    torch's operators take out and sum it up themselves; a rank that holds another's queries was sent delta alone,
    one number for d. The quotient is at most d * max|out|, so it neither overflows nor loses more than one rounding.
    """
    place = dout.abs().argmax(-1, keepdim=True)
    largest = dout.gather(-1, place)
    quotient = torch.where(largest == 0, 0, delta.transpose(1, 2).unsqueeze(-1) / largest)
    return torch.zeros_like(dout).scatter_(-1, place, quotient.to(dout.dtype))


def _cpu_forward(q, k, v, is_causal, bias, scale):
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale)


def _cpu_backward(dout, q, k, v, out, lse, is_causal, bias, scale):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, is_causal, attn_mask=bias, scale=scale
    )


def _flash_forward(q, k, v, is_causal, bias, scale):
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)
    return out, lse


def _flash_backward(dout, q, k, v, out, lse, is_causal, bias, scale):
    # Without dropout the random state is not read; shapes with no cumulative lengths say "not packed".
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    return aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, is_causal, state, state[:0], scale=scale
    )


def _cudnn_forward(q, k, v, is_causal, bias, scale):
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, is_causal, scale=scale)
    return out, lse.reshape(q.shape[:3])


def _cudnn_backward(dout, q, k, v, out, lse, is_causal, bias, scale):
    state = torch.zeros((), dtype=torch.int64, device=q.device)
    return aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse.unsqueeze(-1), state, state, None, None, None, q.shape[2], k.shape[2], 0.0, is_causal,
        scale=scale,
    )  # fmt: skip


CPU = Operator(_cpu_forward, _cpu_backward, takes_bands=True)
FLASH = Operator(_flash_forward, _flash_backward, takes_bands=False)
CUDNN = Operator(_cudnn_forward, _cudnn_backward, takes_bands=False)
