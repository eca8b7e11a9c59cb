"""Forward of attention in Gluon, for Hopper: `gluon_blocks.py` says how a program's groups of warps work together.

A program has three groups that compute, 192 queries, and walks over keys and values.
"""

from __future__ import annotations

import triton.language as tl  # Triton reads the types of arguments as text that begins with tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .gluon_blocks import LN2, LOG2E, ROWS, STAGES, block_bounds, head_rows, load_groups, load_keys, ring, visible
from .triton_blocks import aligned, count_masked, loop_bounds
from .triton_kernels import VARYING


@gluon.jit
def _forward_step(
    acc, peak, total, q_block, keys, values, i, start, stop, row_start, row_stop, factor,
    MASKED: gl.constexpr, BLOCK_N: gl.constexpr, SCORES: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Add block i of keys to (acc, peak, total), as `triton_kernels._forward_step` does; peak is a log2."""
    k_blocks, k_full, k_empty = keys
    v_blocks, v_full, v_empty = values
    buffer, phase = i % STAGES, i // STAGES & 1
    mbarrier.wait(k_full.index(buffer), phase)
    scores = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    scores = warpgroup_mma(q_block, k_blocks.index(buffer).permute([1, 0]), scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, [scores])
    mbarrier.arrive(k_empty.index(buffer), count=1)
    if MASKED:
        column = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
        scores = gl.where(visible(column, stop, row_start, row_stop), scores, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(scores, 1) * factor)
    if MASKED:
        base = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    else:
        base = new_peak
    p = gl.exp2(scores * factor - base[:, None])
    shrink = gl.exp2(peak - base)
    total = total * shrink + gl.sum(p, 1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUT))[:, None]
    weights = gl.convert_layout(p.to(v_blocks.dtype), gl.DotOperandLayout(0, OUT, 2))
    mbarrier.wait(v_full.index(buffer), phase)
    acc = warpgroup_mma(weights, v_blocks.index(buffer), acc, is_async=True)
    acc = warpgroup_mma_wait(0, [acc])
    mbarrier.arrive(v_empty.index(buffer), count=1)
    return acc, new_peak, total


@gluon.jit
def _forward_group(
    q_blocks, q_full, keys, values, out, out_s, lse, rows, first, s_q, left, full, right, end, num_blocks, factor,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, CONTINUES: gl.constexpr,
):  # fmt: skip
    """Write out and lse of the queries of one group, rows `first` on of one head."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    row = first + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    inside = row < s_q
    row_start = gl.load(rows + row, mask=inside, other=0)
    row_stop = gl.load(rows + s_q + row, mask=inside, other=0)
    out_row = first + gl.arange(0, ROWS, gl.SliceLayout(1, OUT))
    dims = gl.arange(0, BLOCK_D, gl.SliceLayout(0, OUT))
    stored = (out_row < s_q)[:, None] & (dims < HEAD_DIM)[None, :]
    out_ptrs = out + out_row[:, None] * out_s + dims[None, :]
    if CONTINUES:
        # A running result is one key of score lse and value out: peak = lse, total = 1, acc = out.
        peak = gl.load(lse + row, mask=inside, other=float("-inf")) * LOG2E
        seen = peak > float("-inf")
        total = gl.where(seen, 1.0, 0.0)
        # The out of a row that has seen no key is uninitialized, perhaps nan.
        read = stored & (gl.load(lse + out_row, mask=out_row < s_q, other=float("-inf")) > float("-inf"))[:, None]
        acc = gl.load(out_ptrs, mask=read, other=0.0)
    else:
        peak = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
        acc = gl.zeros([ROWS, BLOCK_D], gl.float32, OUT)
    mbarrier.wait(q_full, 0)
    q_block = q_blocks.index(GROUP)
    num_full = (right - full) // BLOCK_N
    for i in range(num_full):
        acc, peak, total = _forward_step(
            acc, peak, total, q_block, keys, values, i, 0, 0, row_start, row_stop, factor, False, BLOCK_N, SCORES, OUT
        )
    for i in range(num_full, num_blocks):
        start, stop = block_bounds(i, left, full, right, end, BLOCK_N)
        acc, peak, total = _forward_step(
            acc, peak, total, q_block, keys, values, i, start, stop, row_start, row_stop, factor,
            True, BLOCK_N, SCORES, OUT,
        )  # fmt: skip
    seen = total > 0
    divisor = gl.convert_layout(gl.where(seen, total, 1.0), gl.SliceLayout(1, OUT))
    gl.store(out_ptrs, (acc / divisor[:, None]).to(out.dtype.element_ty), mask=stored)
    gl.store(lse + row, gl.where(seen, (peak + gl.log2(total)) * LN2, float("-inf")), mask=inside)


@gluon.jit(do_not_specialize=VARYING)
def forward_kernel(
    q, k, v, out, lse, rows,
    q_b: tl.int64, q_s: tl.int64, q_h: tl.int64, k_b: tl.int64, k_s: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_s: tl.int64, v_h: tl.int64, out_b: tl.int64, out_s: tl.int64, out_h: tl.int64,
    lse_b: tl.int64, lse_h: tl.int64, num_heads, group, s_q, s_k, scale: tl.float32, softcap: tl.float32,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    CONTINUES: gl.constexpr, SOFTCAP: gl.constexpr, DESCRIPTORS: gl.constexpr,
):  # fmt: skip
    """Write out and lse of a block of queries, or extend them; arguments are those of Triton's `forward_kernel`."""
    gl.static_assert(BLOCK_M == 3 * ROWS and DESCRIPTORS and not SOFTCAP)
    # Later queries see more keys: blocks are taken from the last one, so that the longest programs start first.
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
    k_rows = head_rows(k, k_b, k_s, k_h, batch, kv_head, s_k, HEAD_DIM, [BLOCK_N, BLOCK_D], WALKED)
    v_rows = head_rows(v, v_b, v_s, v_h, batch, kv_head, s_k, HEAD_DIM, [BLOCK_N, BLOCK_D], WALKED)
    q_blocks = gl.allocate_shared_memory(element, [3, ROWS, BLOCK_D], HELD)
    q_full = mbarrier.allocate_mbarrier()
    mbarrier.init(q_full, count=1)
    keys = ring(element, [BLOCK_N, BLOCK_D], WALKED, 3)
    values = ring(element, [BLOCK_N, BLOCK_D], WALKED, 3)
    load_groups(q_rows, q_blocks, q_full, first, 3)

    out_head = out + batch * aligned(out, out_b) + head * aligned(out, out_h)
    lse_head = lse + batch * lse_b + head * lse_h
    step, factor = aligned(out, out_s), scale * LOG2E
    # Registers of a thread, all 512 of four groups: 160 where products are summed, 32 where blocks are loaded.
    gl.warp_specialize(
        [
            (_forward_group, (
                q_blocks, q_full, keys, values, out_head, step, lse_head, rows, first, s_q,
                left, full, right, end, num_blocks, factor, 0, HEAD_DIM, BLOCK_D, BLOCK_N, CONTINUES,
            )),
            (_forward_group, (
                q_blocks, q_full, keys, values, out_head, step, lse_head, rows, first + ROWS, s_q,
                left, full, right, end, num_blocks, factor, 1, HEAD_DIM, BLOCK_D, BLOCK_N, CONTINUES,
            )),
            (_forward_group, (
                q_blocks, q_full, keys, values, out_head, step, lse_head, rows, first + 2 * ROWS, s_q,
                left, full, right, end, num_blocks, factor, 2, HEAD_DIM, BLOCK_D, BLOCK_N, CONTINUES,
            )),
            (load_keys, (k_rows, v_rows, keys, values, left, full, right, end, num_blocks, BLOCK_N)),
        ],
        [4, 4, 4],
        [160, 160, 32],
    )  # fmt: skip
