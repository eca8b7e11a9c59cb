"""Attention in Triton: the functions that launch the kernels of `triton_kernels.py`."""

# pyright: reportCallIssue=false, reportArgumentType=false
# pyright reads a kernel as a plain function: it knows neither launch options nor numbers passed as constexpr.

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
    """Return out `[b, s_q, h_q, d]` and lse `[b, h_q, s_q]` as `attention.attention_forward` does.

    q is `[b, s_q, h_q, d]`, k and v are `[b, s_k, h_kv, d]`.
    """
    q, k, v = (_addressable(x) for x in (q, k, v))
    b, s_q, h, d = q.shape
    # The kernel writes every element of both, so they may start uninitialized.
    out, lse = running or (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty((b, h, s_q), dtype=torch.float32, device=q.device),
    )
    assert _addressable(out) is out, "running results must be laid out as no_result makes them"
    _give_scratch_memory(q.device)
    sizes = blocks("forward", q)
    # One axis of programs: CUDA limits the others to 65,535.
    forward_kernel[(triton.cdiv(s_q, sizes.block_m) * b * h,)](
        q, k, v, out, lse, mask.rows, *(x.stride() for x in (q, k, v, out, lse)),
        h, h // k.shape[2], s_q, k.shape[1], scale, softcap, HEAD_DIM=d, BLOCK_D=padded(d), BLOCK_M=sizes.block_m,
        BLOCK_N=sizes.block_n, CONTINUES=running is not None, SOFTCAP=softcap > 0, DESCRIPTORS=q.itemsize == 2,
        num_warps=sizes.num_warps, num_stages=sizes.num_stages,
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
    """Add dq, dk, dv to the buffers `into`, shaped like q, k, v, as `attention.attention_backward` does.

    dout, q, out are `[b, s_q, h_q, d]`, k, v `[b, s_k, h_kv, d]`, lse, delta `[b, h_q, s_q]`.
    """
    q, k, v, dout = (_addressable(x) for x in (q, k, v, dout))
    if delta is None:
        delta = row_delta(dout, out)
    lse, delta = lse.contiguous(), delta.contiguous()  # the kernels take one set of strides for both
    b, s_q, h, d = q.shape
    s_k, h_kv = k.shape[1], k.shape[2]
    dq, dk, dv = into
    assert all(_addressable(x) is x for x in into), "gradient buffers must be laid out as zeros_fp32 makes them"
    _give_scratch_memory(q.device)
    # dk and dv: a program per block of keys, which sums over the query heads of its group.
    sizes = blocks("backward_dkdv", q)
    backward_dkdv_kernel[(triton.cdiv(s_k, sizes.block_n) * b * h_kv,)](
        q, k, v, dout, lse, delta, dk, dv, mask.columns, *(x.stride() for x in (q, k, v, dout, lse, dk, dv)),
        h_kv, h // h_kv, s_q, s_k, scale, softcap, HEAD_DIM=d, BLOCK_D=padded(d), BLOCK_M=sizes.block_m,
        BLOCK_N=sizes.block_n, SOFTCAP=softcap > 0, DESCRIPTORS=q.itemsize == 2,
        num_warps=sizes.num_warps, num_stages=sizes.num_stages,
    )  # fmt: skip
    # dq: a program per block of queries.
    sizes = blocks("backward_dq", q)
    backward_dq_kernel[(triton.cdiv(s_q, sizes.block_m) * b * h,)](
        q, k, v, dout, lse, delta, dq, mask.rows, *(x.stride() for x in (q, k, v, dout, lse, dq)),
        h, h // h_kv, s_q, s_k, scale, softcap, HEAD_DIM=d, BLOCK_D=padded(d), BLOCK_M=sizes.block_m,
        BLOCK_N=sizes.block_n, SOFTCAP=softcap > 0, DESCRIPTORS=q.itemsize == 2,
        num_warps=sizes.num_warps, num_stages=sizes.num_stages,
    )  # fmt: skip


def row_delta(dout: Tensor, out: Tensor) -> Tensor:
    """Return rowsum(dout * out) `[b, h, s]` fp32 of dout, out `[b, s, h, d]`."""
    b, s_q, h, d = dout.shape
    delta = torch.empty((b, h, s_q), dtype=torch.float32, device=dout.device)
    delta_kernel[(triton.cdiv(s_q, rows_at_once(d)) * b * h,)](
        dout, out, delta, dout.stride(), out.stride(), h, s_q, HEAD_DIM=d, BLOCK_D=padded(d), BLOCK_M=rows_at_once(d)
    )
    return delta


def merge_(out: Tensor, lse: Tensor, part_outs: Tensor, part_lses: Tensor) -> None:
    """Merge part_outs `[n, b, s, h, d]`, part_lses `[n, b, h, s]` into out `[b, s, h, d]`, lse `[b, h, s]`, in place.

    The result is that of `merge.merge_`.
    """
    b, s_q, h, d = out.shape
    merge_kernel[(triton.cdiv(s_q, rows_at_once(d)) * b * h,)](
        out, lse, part_outs, part_lses, *(x.stride() for x in (out, lse, part_outs, part_lses)),
        len(part_outs), h, s_q, HEAD_DIM=d, BLOCK_D=padded(d), BLOCK_M=rows_at_once(d),
    )  # fmt: skip


def padded(head_dim: int) -> int:
    """Return the width of a block: the next power of two, which `tl.arange` needs; the padding reads as 0."""
    return 1 << (head_dim - 1).bit_length()


def rows_at_once(head_dim: int) -> int:
    """Return the rows per program of the delta and merge kernels: 2,048 elements, 16 per thread of 4 warps."""
    return 2048 // padded(head_dim)


def _addressable(x: Tensor) -> Tensor:
    """Return x `[b, s, h, d]`, copied if a TMA descriptor cannot address it.

    A descriptor needs a contiguous last dim, and a base address and other strides that are multiples of 16 bytes.
    """
    if x.stride(-1) == 1 and all(n % 16 == 0 for n in (x.data_ptr(), *(x.itemsize * n for n in x.stride()[:3]))):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _give_scratch_memory(device: torch.device) -> None:
    """Set the allocator of the global memory that holds the descriptors which programs make.

    Triton keeps it in a context variable, which autograd's threads do not inherit, so every launch sets it anew.
    """
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
