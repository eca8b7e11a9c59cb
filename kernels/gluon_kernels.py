"""The forward of attention in Gluon, for Hopper: one group of warps loads keys and values, three others compute.

Each of the three owns a third of a program's queries. They wait for blocks of keys and values, not for each other, so
that the exponentials of one run beside the products of the others. A program has 192 queries, half as many again as one
of `triton_kernels.forward_kernel`, for the same keys from L2.

Blocks lie in a ring of `STAGES` buffers. For each buffer there are two barriers: `full`, on which the loads of a block
arrive, and `empty`, on which the groups arrive that have read it. Use n of a buffer (from 0) ends phase n of both.
"""

from __future__ import annotations

import triton.language as tl  # Triton reads the types of arguments as text that begins with tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .blocks import Blocks
from .triton_blocks import aligned, count_masked, loop_bounds, masked_block
from .triton_kernels import VARYING

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
STAGES = gl.constexpr(3)
GROUPS = gl.constexpr(3)
"""Groups of four warps that compute."""
ROWS = gl.constexpr(64)
"""Queries of a group, the rows of a product of four warps."""
BLOCKS = Blocks(192, 64, 4, 1)
"""Queries and keys of a block, warps of a group, and no stages that the compiler should make."""


@gluon.jit
def _block(i, left, full, right, end, BLOCK_N: gl.constexpr):
    """Return the start of block i and the end of its part; blocks that all rows see come first."""
    num_full = (right - full) // BLOCK_N
    start, stop = masked_block(i - num_full, left, full, right, end, BLOCK_N)
    return gl.where(i < num_full, full + i * BLOCK_N, start), stop


@gluon.jit
def _load(
    k_rows, v_rows, k_blocks, v_blocks, k_full, v_full, k_empty, v_empty, left, full, right, end, num_blocks,
    BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Load blocks of keys and values, each into a buffer that all groups have read."""
    for i in range(num_blocks):
        buffer, phase = i % STAGES, i // STAGES & 1
        start, _ = _block(i, left, full, right, end, BLOCK_N)
        # The phase before the first one counts as ended: the first uses of the buffers do not wait.
        mbarrier.wait(k_empty.index(buffer), phase ^ 1)
        mbarrier.expect(k_full.index(buffer), k_rows.nbytes_per_cta)
        tma.async_copy_global_to_shared(k_rows, [start, 0], k_full.index(buffer), k_blocks.index(buffer))
        mbarrier.wait(v_empty.index(buffer), phase ^ 1)
        mbarrier.expect(v_full.index(buffer), v_rows.nbytes_per_cta)
        tma.async_copy_global_to_shared(v_rows, [start, 0], v_full.index(buffer), v_blocks.index(buffer))


@gluon.jit
def _step(
    acc, peak, total, q_block, k_blocks, v_blocks, k_full, v_full, k_empty, v_empty, i, start, stop,
    row_start, row_stop, factor,
    MASKED: gl.constexpr, BLOCK_N: gl.constexpr, SCORES: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Add block i of keys to (acc, peak, total), as `triton_kernels._forward_step` does; peak is a log2."""
    buffer, phase = i % STAGES, i // STAGES & 1
    mbarrier.wait(k_full.index(buffer), phase)
    scores = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    scores = warpgroup_mma(q_block, k_blocks.index(buffer).permute([1, 0]), scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, [scores])
    mbarrier.arrive(k_empty.index(buffer), count=1)
    if MASKED:
        keys = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
        visible = (keys[None, :] >= row_start[:, None]) & (keys[None, :] < gl.minimum(row_stop, stop)[:, None])
        scores = gl.where(visible, scores, float("-inf"))
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
def _compute(
    q_blocks, q_full, k_blocks, v_blocks, k_full, v_full, k_empty, v_empty, out, out_s, lse, rows, first, s_q,
    left, full, right, end, num_blocks, factor,
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
        acc, peak, total = _step(
            acc, peak, total, q_block, k_blocks, v_blocks, k_full, v_full, k_empty, v_empty, i, 0, 0,
            row_start, row_stop, factor, False, BLOCK_N, SCORES, OUT,
        )  # fmt: skip
    for i in range(num_full, num_blocks):
        start, stop = _block(i, left, full, right, end, BLOCK_N)
        acc, peak, total = _step(
            acc, peak, total, q_block, k_blocks, v_blocks, k_full, v_full, k_empty, v_empty, i, start, stop,
            row_start, row_stop, factor, True, BLOCK_N, SCORES, OUT,
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
    gl.static_assert(BLOCK_M == GROUPS * ROWS and DESCRIPTORS and not SOFTCAP)
    # Later queries see more keys: blocks are taken from the last one, so that the longest programs start first.
    num = (s_q + BLOCK_M - 1) // BLOCK_M
    block, sequence = gl.program_id(0) % num, gl.program_id(0) // num
    batch, head = sequence // num_heads, sequence % num_heads
    kv_head = head // group
    first = (num - 1 - block) * BLOCK_M
    last = gl.minimum(first + BLOCK_M, s_q) - 1
    left, full, right, end = loop_bounds(rows, rows + s_q, first, last, BLOCK_N)
    num_blocks = (right - full) // BLOCK_N + count_masked(left, full, right, end, BLOCK_N)

    Q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_D], q.dtype.element_ty)
    K: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_D], q.dtype.element_ty)
    q_rows = tma.make_tensor_descriptor(
        q + batch * aligned(q, q_b) + head * aligned(q, q_h), [s_q, HEAD_DIM], [aligned(q, q_s), 1], [ROWS, BLOCK_D], Q
    )
    k_rows = tma.make_tensor_descriptor(
        k + batch * aligned(k, k_b) + kv_head * aligned(k, k_h), [s_k, HEAD_DIM], [aligned(k, k_s), 1],
        [BLOCK_N, BLOCK_D], K,
    )  # fmt: skip
    v_rows = tma.make_tensor_descriptor(
        v + batch * aligned(v, v_b) + kv_head * aligned(v, v_h), [s_k, HEAD_DIM], [aligned(v, v_s), 1],
        [BLOCK_N, BLOCK_D], K,
    )  # fmt: skip
    q_blocks = gl.allocate_shared_memory(q.dtype.element_ty, [GROUPS, ROWS, BLOCK_D], Q)
    k_blocks = gl.allocate_shared_memory(q.dtype.element_ty, [STAGES, BLOCK_N, BLOCK_D], K)
    v_blocks = gl.allocate_shared_memory(q.dtype.element_ty, [STAGES, BLOCK_N, BLOCK_D], K)
    q_full = mbarrier.allocate_mbarrier()
    k_full, v_full = mbarrier.allocate_mbarrier(batch=STAGES), mbarrier.allocate_mbarrier(batch=STAGES)
    k_empty, v_empty = mbarrier.allocate_mbarrier(batch=STAGES), mbarrier.allocate_mbarrier(batch=STAGES)
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_empty.index(i), count=GROUPS)
    mbarrier.expect(q_full, GROUPS * q_rows.nbytes_per_cta)
    for i in gl.static_range(GROUPS):
        tma.async_copy_global_to_shared(q_rows, [first + i * ROWS, 0], q_full, q_blocks.index(i))

    out_head = out + batch * aligned(out, out_b) + head * aligned(out, out_h)
    lse_head = lse + batch * lse_b + head * lse_h
    step, factor = aligned(out, out_s), scale * LOG2E
    # Registers of a thread, all 512 of four groups: 160 where products are summed, 32 where blocks are loaded.
    gl.warp_specialize(
        [
            (_compute, (
                q_blocks, q_full, k_blocks, v_blocks, k_full, v_full, k_empty, v_empty, out_head, step, lse_head, rows,
                first, s_q, left, full, right, end, num_blocks, factor, 0, HEAD_DIM, BLOCK_D, BLOCK_N, CONTINUES,
            )),
            (_compute, (
                q_blocks, q_full, k_blocks, v_blocks, k_full, v_full, k_empty, v_empty, out_head, step, lse_head, rows,
                first + ROWS, s_q, left, full, right, end, num_blocks, factor, 1, HEAD_DIM, BLOCK_D, BLOCK_N, CONTINUES,
            )),
            (_compute, (
                q_blocks, q_full, k_blocks, v_blocks, k_full, v_full, k_empty, v_empty, out_head, step, lse_head, rows,
                first + 2 * ROWS, s_q, left, full, right, end, num_blocks, factor, 2, HEAD_DIM, BLOCK_D, BLOCK_N,
                CONTINUES,
            )),
            (_load, (
                k_rows, v_rows, k_blocks, v_blocks, k_full, v_full, k_empty, v_empty, left, full, right, end,
                num_blocks, BLOCK_N,
            )),
        ],
        [4, 4, 4],
        [160, 160, 32],
    )  # fmt: skip
