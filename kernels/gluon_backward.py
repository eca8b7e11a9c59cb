"""Backward of attention in Gluon, for Hopper: `gluon_blocks.py` says how a program's groups of warps work together.

Groups of the backward need more registers than those of the forward, so that two compute: a program for dq has 128
queries and walks over keys and values like the forward, one for dk and dv has 128 keys and walks over the queries of
all heads that share them.
"""

from __future__ import annotations

import triton.language as tl  # Triton reads the types of arguments as text that begins with tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .gluon_blocks import (
    LOG2E,
    ROWS,
    STAGES,
    all_heads,
    barriers,
    block_bounds,
    head_rows,
    load_groups,
    load_keys,
    ring,
    visible,
)
from .triton_blocks import aligned, count_masked, loop_bounds, masked_block
from .triton_kernels import VARYING


@gluon.jit
def _add_rows(ptr, stride, first, num_rows, block, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, SUM: gl.constexpr):
    """Add an fp32 block of ROWS rows to those from `first` on of one head at ptr; write it if they are 16 bit."""
    row = first + gl.arange(0, ROWS, gl.SliceLayout(1, SUM))
    dims = gl.arange(0, BLOCK_D, gl.SliceLayout(0, SUM))
    inside = (row < num_rows)[:, None] & (dims < HEAD_DIM)[None, :]
    ptrs = ptr + row[:, None] * stride + dims[None, :]
    if ptr.dtype.element_ty == gl.float32:
        block += gl.load(ptrs, mask=inside, other=0.0)
    gl.store(ptrs, block.to(ptr.dtype.element_ty), mask=inside)


@gluon.jit
def _load_queries(
    q_heads, dout_heads, lse, delta, lse_h, blocks, all_full, all_empty, head, group, s_q, left, full, right, end,
    BLOCK_M: gl.constexpr,
):  # fmt: skip
    """Load blocks of q, dout, lse (a log2) and delta of all heads of a group, from `head` on.

    All masked blocks come first, head by head, then all others.
    """
    q_blocks, dout_blocks, lse_blocks, delta_blocks = blocks
    lanes = gl.arange(0, BLOCK_M, gl.BlockedLayout([1], [32], [4], [0]))
    num_masked, num_full = count_masked(left, full, right, end, BLOCK_M), (right - full) // BLOCK_M
    for i in range(group * (num_masked + num_full)):
        buffer, phase = i % STAGES, i // STAGES & 1
        j = i - group * num_masked
        start, _ = masked_block(i % gl.maximum(num_masked, 1), left, full, right, end, BLOCK_M)
        start = gl.where(j < 0, start, full + j % gl.maximum(num_full, 1) * BLOCK_M)
        at = head + gl.where(j < 0, i // gl.maximum(num_masked, 1), j // gl.maximum(num_full, 1))
        row = start + lanes
        mbarrier.wait(all_empty.index(buffer), phase ^ 1)
        mbarrier.expect(all_full.index(buffer), q_heads.nbytes_per_cta + dout_heads.nbytes_per_cta)
        tma.async_copy_global_to_shared(q_heads, [at, start, 0], all_full.index(buffer), q_blocks.index(buffer))
        tma.async_copy_global_to_shared(dout_heads, [at, start, 0], all_full.index(buffer), dout_blocks.index(buffer))
        lse_blocks.index(buffer).store(gl.load(lse + at * lse_h + row, mask=row < s_q, other=0.0) * LOG2E)
        delta_blocks.index(buffer).store(gl.load(delta + at * lse_h + row, mask=row < s_q, other=0.0))
        mbarrier.arrive(all_full.index(buffer), count=1)


@gluon.jit
def _dkdv_step(
    dk, dv, k_block, v_block, blocks, all_full, all_empty, i, start, stop, column_start, column_stop, factor,
    MASKED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr, SCORES: gl.constexpr, SUM: gl.constexpr,
):  # fmt: skip
    """Add the gradients from block i of queries to dk and dv, as `triton_kernels._dkdv_step` does."""
    q_blocks, dout_blocks, lse_blocks, delta_blocks = blocks
    buffer, phase = i % STAGES, i // STAGES & 1
    q_block = q_blocks.index(buffer).reshape([BLOCK_M, BLOCK_D])  # [1, BLOCK_M, BLOCK_D] -> [BLOCK_M, BLOCK_D]
    dout_block = dout_blocks.index(buffer).reshape([BLOCK_M, BLOCK_D])
    zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, SCORES)
    mbarrier.wait(all_full.index(buffer), phase)
    products = warpgroup_mma(k_block, q_block.permute([1, 0]), zeros, use_acc=False, is_async=True)
    dp = warpgroup_mma(v_block, dout_block.permute([1, 0]), zeros, use_acc=False, is_async=True)
    products = warpgroup_mma_wait(1, [products])
    lse = lse_blocks.index(buffer).load(gl.SliceLayout(0, SCORES))
    p = gl.exp2(products * factor - lse[None, :])
    if MASKED:
        row = start + gl.arange(0, BLOCK_M, gl.SliceLayout(0, SCORES))
        p = gl.where(visible(row, stop, column_start, column_stop), p, 0.0)
    weights = gl.convert_layout(p.to(q_blocks.dtype), gl.DotOperandLayout(0, SUM, 2))
    dv = warpgroup_mma(weights, dout_block, dv, is_async=True)
    dp = warpgroup_mma_wait(1, [dp])
    delta = delta_blocks.index(buffer).load(gl.SliceLayout(0, SCORES))
    ds = gl.convert_layout((p * (dp - delta[None, :])).to(q_blocks.dtype), gl.DotOperandLayout(0, SUM, 2))
    dk = warpgroup_mma(ds, q_block, dk, is_async=True)
    dk, dv = warpgroup_mma_wait(0, [dk, dv])
    mbarrier.arrive(all_empty.index(buffer), count=1)
    return dk, dv


@gluon.jit
def _dkdv_group(
    k_blocks, v_blocks, held_full, blocks, all_full, all_empty, dk, dk_s, dv, dv_s, columns, first, s_k, group,
    left, full, right, end, scale,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """Add to dk and dv of the keys of one group, rows `first` on of one head, or write them."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    column = first + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    inside = column < s_k
    column_start = gl.load(columns + column, mask=inside, other=0)
    column_stop = gl.load(columns + s_k + column, mask=inside, other=0)
    dk_block = gl.zeros([ROWS, BLOCK_D], gl.float32, SUM)
    dv_block = gl.zeros([ROWS, BLOCK_D], gl.float32, SUM)
    mbarrier.wait(held_full, 0)
    k_block, v_block = k_blocks.index(GROUP), v_blocks.index(GROUP)
    num_masked, num_full = count_masked(left, full, right, end, BLOCK_M), (right - full) // BLOCK_M
    for i in range(group * num_masked):
        start, stop = masked_block(i % num_masked, left, full, right, end, BLOCK_M)
        dk_block, dv_block = _dkdv_step(
            dk_block, dv_block, k_block, v_block, blocks, all_full, all_empty, i, start, stop,
            column_start, column_stop, scale * LOG2E, True, BLOCK_M, BLOCK_D, SCORES, SUM,
        )  # fmt: skip
    for i in range(group * num_masked, group * (num_masked + num_full)):
        dk_block, dv_block = _dkdv_step(
            dk_block, dv_block, k_block, v_block, blocks, all_full, all_empty, i, 0, 0,
            column_start, column_stop, scale * LOG2E, False, BLOCK_M, BLOCK_D, SCORES, SUM,
        )  # fmt: skip
    _add_rows(dk, dk_s, first, s_k, dk_block * scale, HEAD_DIM, BLOCK_D, SUM)
    _add_rows(dv, dv_s, first, s_k, dv_block, HEAD_DIM, BLOCK_D, SUM)


@gluon.jit(do_not_specialize=VARYING)
def backward_dkdv_kernel(
    q, k, v, dout, lse, delta, dk, dv, columns,
    q_b: tl.int64, q_s: tl.int64, q_h: tl.int64, k_b: tl.int64, k_s: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_s: tl.int64, v_h: tl.int64, dout_b: tl.int64, dout_s: tl.int64, dout_h: tl.int64,
    lse_b: tl.int64, lse_h: tl.int64, dk_b: tl.int64, dk_s: tl.int64, dk_h: tl.int64,
    dv_b: tl.int64, dv_s: tl.int64, dv_h: tl.int64,
    num_kv_heads, group, s_q, s_k, scale: tl.float32, softcap: tl.float32,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    SOFTCAP: gl.constexpr, DESCRIPTORS: gl.constexpr,
):  # fmt: skip
    """Add to dk and dv of a block of keys, or write them; arguments are those of Triton's `backward_dkdv_kernel`."""
    gl.static_assert(BLOCK_N == 2 * ROWS and DESCRIPTORS and not SOFTCAP)
    num = (s_k + BLOCK_N - 1) // BLOCK_N
    block, sequence = gl.program_id(0) % num, gl.program_id(0) // num
    batch, kv_head = sequence // num_kv_heads, sequence % num_kv_heads
    first = block * BLOCK_N
    last = gl.minimum(first + BLOCK_N, s_k) - 1
    left, full, right, end = loop_bounds(columns, columns + s_k, first, last, BLOCK_M)

    element: gl.constexpr = q.dtype.element_ty
    HELD: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_D], element)
    WALKED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, BLOCK_M, BLOCK_D], element)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_rows = head_rows(k, k_b, k_s, k_h, batch, kv_head, s_k, HEAD_DIM, [ROWS, BLOCK_D], HELD)
    v_rows = head_rows(v, v_b, v_s, v_h, batch, kv_head, s_k, HEAD_DIM, [ROWS, BLOCK_D], HELD)
    num_heads = num_kv_heads * group
    q_heads = all_heads(q, q_b, q_s, q_h, batch, num_heads, s_q, HEAD_DIM, [1, BLOCK_M, BLOCK_D], WALKED)
    dout_heads = all_heads(dout, dout_b, dout_s, dout_h, batch, num_heads, s_q, HEAD_DIM, [1, BLOCK_M, BLOCK_D], WALKED)
    k_blocks = gl.allocate_shared_memory(element, [2, ROWS, BLOCK_D], HELD)
    v_blocks = gl.allocate_shared_memory(element, [2, ROWS, BLOCK_D], HELD)
    held_full = mbarrier.allocate_mbarrier()
    mbarrier.init(held_full, count=2)
    blocks = (
        gl.allocate_shared_memory(element, [STAGES, 1, BLOCK_M, BLOCK_D], WALKED),
        gl.allocate_shared_memory(element, [STAGES, 1, BLOCK_M, BLOCK_D], WALKED),
        gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], LINE),
        gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], LINE),
    )
    # Two arrivals fill a buffer: that of q and dout, and that of lse and delta.
    all_full, all_empty = barriers(2, 2)
    load_groups(k_rows, k_blocks, held_full, first, 2)
    load_groups(v_rows, v_blocks, held_full, first, 2)

    dk_head = dk + batch * aligned(dk, dk_b) + kv_head * aligned(dk, dk_h)
    dv_head = dv + batch * aligned(dv, dv_b) + kv_head * aligned(dv, dv_h)
    dk_step, dv_step = aligned(dk, dk_s), aligned(dv, dv_s)
    # Registers of a thread, 504 of three groups.
    gl.warp_specialize(
        [
            (_dkdv_group, (
                k_blocks, v_blocks, held_full, blocks, all_full, all_empty, dk_head, dk_step, dv_head, dv_step, columns,
                first, s_k, group, left, full, right, end, scale, 0, HEAD_DIM, BLOCK_D, BLOCK_M,
            )),
            (_dkdv_group, (
                k_blocks, v_blocks, held_full, blocks, all_full, all_empty, dk_head, dk_step, dv_head, dv_step, columns,
                first + ROWS, s_k, group, left, full, right, end, scale, 1, HEAD_DIM, BLOCK_D, BLOCK_M,
            )),
            (_load_queries, (
                q_heads, dout_heads, lse + batch * lse_b, delta + batch * lse_b, lse_h, blocks, all_full, all_empty,
                kv_head * group, group, s_q, left, full, right, end, BLOCK_M,
            )),
        ],
        [4, 4],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _dq_step(
    dq, q_block, dout_block, lse, delta, keys, values, i, start, stop, row_start, row_stop, factor,
    MASKED: gl.constexpr, BLOCK_N: gl.constexpr, SCORES: gl.constexpr, SUM: gl.constexpr,
):  # fmt: skip
    """Return dq with the gradients from block i of keys added, as `triton_kernels._dq_step` does; lse is a log2."""
    k_blocks, k_full, k_empty = keys
    v_blocks, v_full, v_empty = values
    buffer, phase = i % STAGES, i // STAGES & 1
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    mbarrier.wait(k_full.index(buffer), phase)
    products = warpgroup_mma(q_block, k_blocks.index(buffer).permute([1, 0]), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(buffer), phase)
    dp = warpgroup_mma(dout_block, v_blocks.index(buffer).permute([1, 0]), zeros, use_acc=False, is_async=True)
    products = warpgroup_mma_wait(1, [products])
    p = gl.exp2(products * factor - lse[:, None])
    if MASKED:
        column = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
        p = gl.where(visible(column, stop, row_start, row_stop), p, 0.0)
    dp = warpgroup_mma_wait(0, [dp])
    ds = gl.convert_layout((p * (dp - delta[:, None])).to(k_blocks.dtype), gl.DotOperandLayout(0, SUM, 2))
    dq = warpgroup_mma(ds, k_blocks.index(buffer), dq, is_async=True)
    dq = warpgroup_mma_wait(0, [dq])
    mbarrier.arrive(k_empty.index(buffer), count=1)
    mbarrier.arrive(v_empty.index(buffer), count=1)
    return dq


@gluon.jit
def _dq_group(
    q_blocks, dout_blocks, held_full, keys, values, lse, delta, dq, dq_s, rows, first, s_q,
    left, full, right, end, num_blocks, scale,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Add to dq of the queries of one group, rows `first` on of one head, or write it."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    row = first + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    inside = row < s_q
    row_start = gl.load(rows + row, mask=inside, other=0)
    row_stop = gl.load(rows + s_q + row, mask=inside, other=0)
    lse_row = gl.load(lse + row, mask=inside, other=float("inf")) * LOG2E
    delta_row = gl.load(delta + row, mask=inside, other=0.0)
    dq_block = gl.zeros([ROWS, BLOCK_D], gl.float32, SUM)
    mbarrier.wait(held_full, 0)
    q_block, dout_block = q_blocks.index(GROUP), dout_blocks.index(GROUP)
    num_full = (right - full) // BLOCK_N
    for i in range(num_full):
        dq_block = _dq_step(
            dq_block, q_block, dout_block, lse_row, delta_row, keys, values, i, 0, 0, row_start, row_stop,
            scale * LOG2E, False, BLOCK_N, SCORES, SUM,
        )  # fmt: skip
    for i in range(num_full, num_blocks):
        start, stop = block_bounds(i, left, full, right, end, BLOCK_N)
        dq_block = _dq_step(
            dq_block, q_block, dout_block, lse_row, delta_row, keys, values, i, start, stop, row_start, row_stop,
            scale * LOG2E, True, BLOCK_N, SCORES, SUM,
        )  # fmt: skip
    _add_rows(dq, dq_s, first, s_q, dq_block * scale, HEAD_DIM, BLOCK_D, SUM)


@gluon.jit(do_not_specialize=VARYING)
def backward_dq_kernel(
    q, k, v, dout, lse, delta, dq, rows,
    q_b: tl.int64, q_s: tl.int64, q_h: tl.int64, k_b: tl.int64, k_s: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_s: tl.int64, v_h: tl.int64, dout_b: tl.int64, dout_s: tl.int64, dout_h: tl.int64,
    lse_b: tl.int64, lse_h: tl.int64, dq_b: tl.int64, dq_s: tl.int64, dq_h: tl.int64,
    num_heads, group, s_q, s_k, scale: tl.float32, softcap: tl.float32,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    SOFTCAP: gl.constexpr, DESCRIPTORS: gl.constexpr,
):  # fmt: skip
    """Add to dq of a block of queries, or write it; arguments are those of Triton's `backward_dq_kernel`."""
    gl.static_assert(BLOCK_M == 2 * ROWS and DESCRIPTORS and not SOFTCAP)
    # From the last block, as in the forward.
    num = (s_q + BLOCK_M - 1) // BLOCK_M
    block, sequence = gl.program_id(0) % num, gl.program_id(0) // num
    batch, head = sequence // num_heads, sequence % num_heads
    kv_head = head // group
    first = (num - 1 - block) * BLOCK_M
    last = gl.minimum(first + BLOCK_M, s_q) - 1
    left, full, right, end = loop_bounds(rows, rows + s_q, first, last, BLOCK_N)
    num_blocks = (right - full) // BLOCK_N + count_masked(left, full, right, end, BLOCK_N)

    element: gl.constexpr = q.dtype.element_ty
    HELD: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_D], element)
    WALKED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_D], element)
    q_rows = head_rows(q, q_b, q_s, q_h, batch, head, s_q, HEAD_DIM, [ROWS, BLOCK_D], HELD)
    dout_rows = head_rows(dout, dout_b, dout_s, dout_h, batch, head, s_q, HEAD_DIM, [ROWS, BLOCK_D], HELD)
    k_rows = head_rows(k, k_b, k_s, k_h, batch, kv_head, s_k, HEAD_DIM, [BLOCK_N, BLOCK_D], WALKED)
    v_rows = head_rows(v, v_b, v_s, v_h, batch, kv_head, s_k, HEAD_DIM, [BLOCK_N, BLOCK_D], WALKED)
    q_blocks = gl.allocate_shared_memory(element, [2, ROWS, BLOCK_D], HELD)
    dout_blocks = gl.allocate_shared_memory(element, [2, ROWS, BLOCK_D], HELD)
    held_full = mbarrier.allocate_mbarrier()
    mbarrier.init(held_full, count=2)
    keys = ring(element, [BLOCK_N, BLOCK_D], WALKED, 2)
    values = ring(element, [BLOCK_N, BLOCK_D], WALKED, 2)
    load_groups(q_rows, q_blocks, held_full, first, 2)
    load_groups(dout_rows, dout_blocks, held_full, first, 2)

    offset = batch * lse_b + head * lse_h
    dq_head = dq + batch * aligned(dq, dq_b) + head * aligned(dq, dq_h)
    step = aligned(dq, dq_s)
    # Registers as for dk and dv.
    gl.warp_specialize(
        [
            (_dq_group, (
                q_blocks, dout_blocks, held_full, keys, values, lse + offset, delta + offset, dq_head, step,
                rows, first, s_q, left, full, right, end, num_blocks, scale, 0, HEAD_DIM, BLOCK_D, BLOCK_N,
            )),
            (_dq_group, (
                q_blocks, dout_blocks, held_full, keys, values, lse + offset, delta + offset, dq_head, step,
                rows, first + ROWS, s_q, left, full, right, end, num_blocks, scale, 1, HEAD_DIM, BLOCK_D, BLOCK_N,
            )),
            (load_keys, (k_rows, v_rows, keys, values, left, full, right, end, num_blocks, BLOCK_N)),
        ],
        [4, 4],
        [240, 24],
    )  # fmt: skip
