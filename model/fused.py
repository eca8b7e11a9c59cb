"""RMSNorm, SwiGLU and RoPE: liger-kernel's Triton kernels for CUDA tensors, plain torch for others.

Both give equal results within the rounding of the input's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class FusedOps:
    """One implementation of the three operators, all differentiable. All tensors but RoPE's table have one dtype."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    """(x `[..., n]`, weight `[n]`, epsilon) -> x / sqrt(mean(x^2) + epsilon) * weight (arXiv 1910.07467)."""
    swiglu: Callable[[Tensor], Tensor]
    """(gate and up, concatenated `[..., 2 n]`) -> silu(gate) * up `[..., n]` (arXiv 2002.05202)."""
    rope: Callable[[Tensor, Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]
    """(q `[b, s, h_q, d]`, k `[b, s, h_kv, d]`, cos and sin `[s, d / 2]` fp32) -> q and k, same shapes, with each pair
    of dims (i, i + d/2) rotated by the angle of its position (arXiv 2104.09864). It may overwrite q, k and the
    gradients that its backward receives, so nothing else may read them."""


def fused_ops(x: Tensor) -> FusedOps:
    """Return the implementation for tensors on the device of x (any shape)."""
    return LIGER if x.is_cuda else TORCH


def _torch_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, epsilon)


class _TorchSwiGLU(torch.autograd.Function):
    """SwiGLU that keeps its input alone: autograd would keep silu(gate) as well."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        [gate_up] = ctx.saved_tensors
        dgate_up = torch.empty_like(gate_up)
        (gate, up), (dgate, dup) = gate_up.chunk(2, dim=-1), dgate_up.chunk(2, dim=-1)
        # In place in the result: at long contexts the first touch of new memory costs more than the arithmetic.
        torch.ops.aten.silu(gate, out=dup)
        dup.mul_(dy)
        torch.mul(dy, up, out=dgate)
        torch.ops.aten.silu_backward(dgate, gate, grad_input=dgate)
        return dgate_up


class _TorchRope(torch.autograd.Function):
    """The rotation of x `[b, s, h, d]`; its backward is the rotation by the opposite angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotated(dy, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[:, None], sin[:, None]  # [s, 1, d / 2], against halves of x [b, s, h, d / 2]
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    into_first, into_second = rotated.chunk(2, dim=-1)
    into_first.copy_(first).mul_(cos).addcmul_(second, sin, value=-1)
    into_second.copy_(second).mul_(cos).addcmul_(first, sin)
    return rotated.to(x.dtype)


def _torch_rope(q: Tensor, k: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return _TorchRope.apply(q, *table), _TorchRope.apply(k, *table)


# liger is imported late: a machine without CUDA need not have it. The submodules are imported by name, since the
# package liger_kernel.ops may substitute other implementations.


def _liger_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # "gemma" with offset 0 multiplies by the weight in fp32 and rounds once, as torch does. in_place = False: otherwise
    # dx would overwrite the gradient that autograd passes in.
    return LigerRMSNormFunction.apply(x, weight, epsilon, 0.0, "gemma", False)


def _liger_swiglu(gate_up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    # This function reads both halves in place; LigerSiLUMulFunction would copy each and overwrite its saved tensors.
    # The input is flattened because the gradient has the shape [rows, 2 n] whatever the input's shape.
    return LigerFusedGateUpSiLUMulFunction.apply(gate_up.flatten(0, -2)).unflatten(0, gate_up.shape[:-1])


def _liger_rope(q: Tensor, k: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.rope import LigerRopeFunction

    # The function takes views [b, h, s, d] of tensors [b, s, h, d] and computes in the table's dtype, fp32. The number
    # of dims to rotate is given because its default is the table's width, which is half of them here.
    q, k = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), *table, None, 1, q.shape[-1])
    return q.transpose(1, 2), k.transpose(1, 2)


TORCH = FusedOps(_torch_rms_norm, _TorchSwiGLU.apply, _torch_rope)
LIGER = FusedOps(_liger_rms_norm, _liger_swiglu, _liger_rope)
