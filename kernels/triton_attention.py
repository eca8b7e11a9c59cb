"""Attention in Triton: launches the kernels of `triton_kernels.py`."""

# pyright: reportCallIssue=false, reportArgumentType=false
# (pyright reads a kernel as a plain function: it knows neither launch options nor numbers passed as constexpr.)

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .blocks import blocks
from .mask import Mask
from .triton_kernels import backward_dkdv_kernel, backward_dq_kernel, delta_kernel, forward_kernel, merge_kernel


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float, running: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """See `attention.attention_forward`."""
    q, k, v = (_addressable(x) for x in (q, k, v))
    b, s_q, h, d = q.shape
    # The kernel writes every element of both, whatever they hold.
    out, lse = running or (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty((b, h, s_q), dtype=torch.float32, device=q.device),
    )
    assert _addressable(out) is out, "running results are laid out as by no_result"
    _give_scratch_memory(q.device)
    at = blocks("forward", q)
    forward_kernel[(triton.cdiv(s_q, at.block_m) * b * h,)](
        q, k, v, out, lse, mask.rows, *(x.stride() for x in (q, k, v, out, lse)),
        h, h // k.shape[2], s_q, k.shape[1], scale, softcap, HEAD_DIM=d, BLOCK_D=padded(d), BLOCK_M=at.block_m,
        BLOCK_N=at.block_n, CONTINUES=running is not None, SOFTCAP=softcap > 0, DESCRIPTORS=q.itemsize == 2,
        num_warps=at.num_warps, num_stages=at.num_stages,
    )  # fmt: skip
    return out, lse


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
    """See `attention.attention_backward`."""
    q, k, v, dout = (_addressable(x) for x in (q, k, v, dout))
    if delta is None:
        delta = row_delta(dout, out)
    lse, delta = lse.contiguous(), delta.contiguous()  # the kernels take one set of strides for both
    b, s_q, h, d = q.shape
    s_k, h_kv = k.shape[1], k.shape[2]
    dq, dk, dv = into
    assert all(_addressable(x) is x for x in into), "gradients are laid out as by zeros_fp32"
    _give_scratch_memory(q.device)
    at = blocks("backward_dkdv", q)
    backward_dkdv_kernel[(triton.cdiv(s_k, at.block_n) * b * h_kv,)](
        q, k, v, dout, lse, delta, dk, dv, mask.columns, *(x.stride() for x in (q, k, v, dout, lse, dk, dv)),
        h_kv, h // h_kv, s_q, s_k, scale, softcap, HEAD_DIM=d, BLOCK_D=padded(d), BLOCK_M=at.block_m,
        BLOCK_N=at.block_n, SOFTCAP=softcap > 0, DESCRIPTORS=q.itemsize == 2,
        num_warps=at.num_warps, num_stages=at.num_stages,
    )  # fmt: skip
    at = blocks("backward_dq", q)
    backward_dq_kernel[(triton.cdiv(s_q, at.block_m) * b * h,)](
        q, k, v, dout, lse, delta, dq, mask.rows, *(x.stride() for x in (q, k, v, dout, lse, dq)),
        h, h // h_kv, s_q, s_k, scale, softcap, HEAD_DIM=d, BLOCK_D=padded(d), BLOCK_M=at.block_m,
        BLOCK_N=at.block_n, SOFTCAP=softcap > 0, DESCRIPTORS=q.itemsize == 2,
        num_warps=at.num_warps, num_stages=at.num_stages,
    )  # fmt: skip


def row_delta(dout: Tensor, out: Tensor) -> Tensor:
    """See `attention.row_delta`."""
    b, s_q, h, d = dout.shape
    delta = torch.empty((b, h, s_q), dtype=torch.float32, device=dout.device)
    delta_kernel[(triton.cdiv(s_q, rows_at_once(d)) * b * h,)](
        dout, out, delta, dout.stride(), out.stride(), h, s_q, HEAD_DIM=d, BLOCK_D=padded(d), BLOCK_M=rows_at_once(d)
    )
    return delta


def merge_(out: Tensor, lse: Tensor, part_outs: Tensor, part_lses: Tensor) -> None:
    """See `merge.merge_`."""
    b, s_q, h, d = out.shape
    merge_kernel[(triton.cdiv(s_q, rows_at_once(d)) * b * h,)](
        out, lse, part_outs, part_lses, *(x.stride() for x in (out, lse, part_outs, part_lses)),
        len(part_outs), h, s_q, HEAD_DIM=d, BLOCK_D=padded(d), BLOCK_M=rows_at_once(d),
    )  # fmt: skip


def padded(head_dim: int) -> int:
    """Width of a block: tensor cores and `tl.arange` ask for a power of two; what lies beyond head_dim reads as 0."""
    return 1 << (head_dim - 1).bit_length()


def rows_at_once(head_dim: int) -> int:
    """Rows of a program of the two kernels that only read and write: 2,048 elements, 16 a thread."""
    return 2048 // padded(head_dim)


def _addressable(x: Tensor) -> Tensor:
    """x, copied only if a descriptor cannot address it: last dim contiguous, all else in steps of 16 bytes."""
    if x.stride(-1) == 1 and all(n % 16 == 0 for n in (x.data_ptr(), *(x.itemsize * n for n in x.stride()[:3]))):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _give_scratch_memory(device: torch.device) -> None:
    """Descriptors made by programs lie in global memory, which Triton asks its host for.

    The answer is a context variable, and autograd's threads do not inherit it: it is set before every launch.
    """
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
