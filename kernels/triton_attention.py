"""Attention in Triton: the functions that launch the kernels of `triton_kernels.py`."""

# pyright: reportCallIssue=false, reportArgumentType=false
# pyright reads a kernel as a plain function: it knows neither launch options nor numbers passed as constexpr.

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .blocks import Blocks, blocks
from .case import addressable
from .mask import Mask
from .triton_kernels import backward_dkdv_kernel, backward_dq_kernel, delta_kernel, forward_kernel, merge_kernel


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float, running: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Return out `[b, s_q, h_q, d]` and lse `[b, h_q, s_q]` as `attention.attention_forward` does.

    q is `[b, s_q, h_q, d]`, k and v are `[b, s_k, h_kv, d]`.
    """
    return _forward(forward_kernel, blocks("forward", q), q, k, v, mask, scale, softcap, running)


def forward_by_gluon(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float, running: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Compute the same as `forward` by the kernel for Hopper of `gluon_forward.py`, which has no softcap."""
    from .gluon_blocks import BLOCKS  # imported late: Gluon differs in older versions of Triton
    from .gluon_forward import forward_kernel

    return _forward(forward_kernel, BLOCKS["forward"], q, k, v, mask, scale, softcap, running)


def _forward(
    kernel: Any, sizes: Blocks, q: Tensor, k: Tensor, v: Tensor, mask: Mask,
    scale: float, softcap: float, running: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if scale <= 0:  # the kernel scales the largest product of a row, which must stay the largest
        q, scale = q * (-1 if scale < 0 else 0), abs(scale) or 1.0
    q, k, v = (addressable(x) for x in (q, k, v))
    b, s_q, h, d = q.shape
    # The kernel writes every element of both, so they may start uninitialized.
    out, lse = running or (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty((b, h, s_q), dtype=torch.float32, device=q.device),
    )
    assert addressable(out) is out, "running results must be laid out as no_result makes them"
    _give_scratch_memory(q.device)
    numbers = (*_strides(q, k, v, out), *lse.stride()[:2], h, h // k.shape[2], s_q, k.shape[1], scale, softcap)
    constants = (d, padded(d), sizes.block_m, sizes.block_n, running is not None, softcap > 0, q.itemsize == 2)
    num_programs = _num_blocks(s_q, sizes.block_m) * b * h
    _launch(kernel, num_programs, (q, k, v, out, lse, mask.rows), numbers, constants, sizes)
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

    Buffers in 16 bit are written instead, whatever they hold: a sequence whose keys are all here has nothing to add to.
    dout, q, out are `[b, s_q, h_q, d]`, k, v `[b, s_k, h_kv, d]`, lse, delta `[b, h_q, s_q]`.
    """
    dkdv, dq = (backward_dkdv_kernel, blocks("backward_dkdv", q)), (backward_dq_kernel, blocks("backward_dq", q))
    _backward(dkdv, dq, dout, q, k, v, out, lse, delta, mask, scale, softcap, into)


def backward_by_gluon(
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
    """Compute the same as `backward` by the kernels for Hopper of `gluon_backward.py`, which have no softcap."""
    from .gluon_backward import (  # imported late: older Tritons have another Gluon
        backward_dkdv_kernel,
        backward_dq_kernel,
    )
    from .gluon_blocks import BLOCKS

    dkdv = backward_dkdv_kernel, BLOCKS["backward_dkdv"]
    dq = backward_dq_kernel, BLOCKS["backward_dq"]
    _backward(dkdv, dq, dout, q, k, v, out, lse, delta, mask, scale, softcap, into)


def _backward(
    dkdv_kernel: tuple[Any, Blocks], dq_kernel: tuple[Any, Blocks], dout: Tensor, q: Tensor, k: Tensor, v: Tensor,
    out: Tensor | None, lse: Tensor, delta: Tensor | None, mask: Mask, scale: float, softcap: float,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    q, k, v, dout = (addressable(x) for x in (q, k, v, dout))
    if delta is None:
        delta = row_delta(dout, out)
    # The kernels take one set of strides for both, and adjacent rows.
    if lse.stride() != delta.stride() or lse.stride(2) != 1:
        lse, delta = lse.contiguous(), delta.contiguous()
    b, s_q, h, d = q.shape
    s_k, h_kv = k.shape[1], k.shape[2]
    dq, dk, dv = into
    assert all(addressable(x) is x for x in into), "gradient buffers must be laid out as zeros_fp32 makes them"
    _give_scratch_memory(q.device)
    # dk and dv: a program per block of keys, which sums over the query heads of its group.
    kernel, sizes = dkdv_kernel
    inputs, strides = (q, k, v, dout, lse, delta), (*_strides(q, k, v, dout), *lse.stride()[:2])
    numbers = (*strides, *_strides(dk, dv), h_kv, h // h_kv, s_q, s_k, scale, softcap)
    constants = (d, padded(d), sizes.block_m, sizes.block_n, softcap > 0, q.itemsize == 2)
    num_programs = _num_blocks(s_k, sizes.block_n) * b * h_kv
    _launch(kernel, num_programs, (*inputs, dk, dv, mask.columns), numbers, constants, sizes)
    # dq: a program per block of queries.
    kernel, sizes = dq_kernel
    numbers = (*strides, *_strides(dq), h, h // h_kv, s_q, s_k, scale, softcap)
    constants = (d, padded(d), sizes.block_m, sizes.block_n, softcap > 0, q.itemsize == 2)
    num_programs = _num_blocks(s_q, sizes.block_m) * b * h
    _launch(kernel, num_programs, (*inputs, dq, mask.rows), numbers, constants, sizes)


def row_delta(dout: Tensor, out: Tensor) -> Tensor:
    """Return rowsum(dout * out) `[b, h, s]` fp32 of dout, out `[b, s, h, d]`."""
    dout, out = addressable(dout), addressable(out)
    b, s_q, h, d = dout.shape
    delta = torch.empty((b, h, s_q), dtype=torch.float32, device=dout.device)
    numbers, rows = (*_strides(dout, out), h, s_q), rows_at_once(d)
    _launch(delta_kernel, _num_blocks(s_q, rows) * b * h, (dout, out, delta), numbers, (d, padded(d), rows))
    return delta


def merge_(out: Tensor, lse: Tensor, part_outs: Tensor, part_lses: Tensor) -> None:
    """Merge part_outs `[n, b, s, h, d]`, part_lses `[n, b, h, s]` into out `[b, s, h, d]`, lse `[b, h, s]`, in place.

    The result is that of `merge.merge_`.
    """
    b, s_q, h, d = out.shape
    part_outs = addressable(part_outs)
    if part_lses.stride(3) != 1:  # the kernel reads adjacent rows
        part_lses = part_lses.contiguous()
    assert lse.stride(2) == 1 and addressable(out) is out, "running results must be laid out as no_result makes them"
    numbers = (*_strides(out), *lse.stride()[:2], *part_outs.stride()[:4], *part_lses.stride()[:3])
    numbers, rows = (*numbers, len(part_outs), h, s_q), rows_at_once(d)
    tensors = (out, lse, part_outs, part_lses)
    _launch(merge_kernel, _num_blocks(s_q, rows) * b * h, tensors, numbers, (d, padded(d), rows))


_COMPILED: dict[tuple[Any, ...], Any] = {}
"""Compiled kernels by kernel, device, constants, block sizes and dtypes."""


def _launch(
    kernel: Any,
    num_programs: int,
    tensors: tuple[Tensor, ...],
    numbers: tuple[float, ...],
    constants: tuple[int, ...],
    sizes: Blocks | None = None,
) -> None:
    """Launch a kernel, whose arguments are `tensors`, `numbers` and `constants` in this order.

    Triton searches for the compiled kernel by looking at every argument, which takes longer than the launch. Here it is
    known by less: numbers do not matter to it (`triton_kernels.VARYING`), nor do addresses (`addressable`).
    """
    key = (kernel, tensors[0].device, constants, sizes, *(x.dtype for x in tensors))
    compiled = _COMPILED.get(key)
    if compiled is not None:
        # One axis of programs: CUDA limits the others to 65,535.
        compiled[num_programs, 1, 1](*tensors, *numbers, *constants)
        return
    options = {} if sizes is None else {"num_warps": sizes.num_warps, "num_stages": sizes.num_stages}
    compiled = kernel[num_programs,](*tensors, *numbers, *constants, **options)
    # Triton returns the compiled kernel, but None where kernels are interpreted. On AMD it compiles a second one for
    # tensors beyond 2 GiB, which the key does not tell from the first.
    if torch.version.hip is None:
        _COMPILED[key] = compiled


def padded(head_dim: int) -> int:
    """Return the width of a block: the next power of two, which `tl.arange` needs; the padding reads as 0."""
    return 1 << (head_dim - 1).bit_length()


def rows_at_once(head_dim: int) -> int:
    """Return the rows per program of the delta and merge kernels: 2,048 elements, 16 per thread of 4 warps."""
    return 2048 // padded(head_dim)


def _num_blocks(num_rows: int, block: int) -> int:
    return -(-num_rows // block)


def _strides(*tensors: Tensor) -> list[int]:
    """Return the strides of dims b, s and h of each tensor `[b, s, h, d]`, one after another."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _give_scratch_memory(device: torch.device) -> None:
    """Set the allocator of the global memory that holds the descriptors which programs make.

    Triton keeps it in a context variable, which autograd's threads do not inherit, so every launch sets it anew.
    """
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
