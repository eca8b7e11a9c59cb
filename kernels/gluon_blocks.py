"""Shared parts of the attention kernels in Gluon for Hopper: rings of blocks, their loads, and the blocks of a loop.

In a program one group of warps loads blocks of rows, and two or three others compute. The groups that compute wait for
blocks, not for each other, so that the exponentials of one run beside the products of the others. Each has 64 rows.
Masks and arithmetic are those of `triton_kernels.py`.

Blocks lie in a ring of `STAGES` buffers. For each buffer there are two barriers: `full`, on which the loads of a block
arrive, and `empty`, on which the groups arrive that have read it. Use n of a buffer (from 0) ends phase n of both.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .blocks import Blocks
from .triton_blocks import aligned, masked_block

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
STAGES = gl.constexpr(3)
ROWS = gl.constexpr(64)
"""Number of rows of each computing group: those of one matrix product of four warps."""
BLOCKS = {
    "forward": Blocks(192, 64, 4, 1),
    "backward_dkdv": Blocks(64, 128, 4, 1),
    "backward_dq": Blocks(128, 64, 4, 1),
}
"""Queries and keys per block, and warps per group; one stage, since the kernels pipeline their loads themselves."""


@gluon.jit
def barriers(LOADS: gl.constexpr, GROUPS: gl.constexpr):
    """Return the barriers of the buffers: `full` after LOADS arrivals, `empty` after those of all groups."""
    full, empty = mbarrier.allocate_mbarrier(batch=STAGES), mbarrier.allocate_mbarrier(batch=STAGES)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=LOADS)
        mbarrier.init(empty.index(i), count=GROUPS)
    return full, empty


@gluon.jit
def ring(element: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr, GROUPS: gl.constexpr):
    """Return buffers for blocks `SHAPE`, and their barriers `full` and `empty`."""
    blocks = gl.allocate_shared_memory(element, [STAGES, SHAPE[0], SHAPE[1]], LAYOUT)
    full, empty = barriers(1, GROUPS)
    return blocks, full, empty


@gluon.jit
def head_rows(
    ptr, stride_b, stride_s, stride_h, batch, head, num_rows,
    HEAD_DIM: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Return one head of a `[b, s, h, d]` tensor as a descriptor of blocks `[rows, dims]`."""
    base = ptr + batch * aligned(ptr, stride_b) + head * aligned(ptr, stride_h)
    return tma.make_tensor_descriptor(base, [num_rows, HEAD_DIM], [aligned(ptr, stride_s), 1], SHAPE, LAYOUT)


@gluon.jit
def all_heads(
    ptr, stride_b, stride_s, stride_h, batch, num_heads, num_rows,
    HEAD_DIM: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Return all heads of a `[b, s, h, d]` tensor as a descriptor of blocks `[1, rows, dims]`."""
    base = ptr + batch * aligned(ptr, stride_b)
    return tma.make_tensor_descriptor(
        base, [num_heads, num_rows, HEAD_DIM], [aligned(ptr, stride_h), aligned(ptr, stride_s), 1], SHAPE, LAYOUT
    )


@gluon.jit
def load_groups(rows, blocks, full, first, GROUPS: gl.constexpr):
    """Load the rows from `first` on that the groups hold for the whole loop."""
    mbarrier.expect(full, GROUPS * rows.nbytes_per_cta)
    for i in gl.static_range(GROUPS):
        tma.async_copy_global_to_shared(rows, [first + i * ROWS, 0], full, blocks.index(i))


@gluon.jit
def block_bounds(i, left, full, right, end, STEP: gl.constexpr):
    """Return the start of block i and the end of its part; blocks that all rows see come first."""
    num_full = (right - full) // STEP
    start, stop = masked_block(i - num_full, left, full, right, end, STEP)
    return gl.where(i < num_full, full + i * STEP, start), stop


@gluon.jit
def load_keys(k_rows, v_rows, keys, values, left, full, right, end, num_blocks, BLOCK_N: gl.constexpr):
    """Load blocks of keys and values, each into a buffer that all groups have read."""
    k_blocks, k_full, k_empty = keys
    v_blocks, v_full, v_empty = values
    for i in range(num_blocks):
        buffer, phase = i % STAGES, i // STAGES & 1
        start, _ = block_bounds(i, left, full, right, end, BLOCK_N)
        # The phase before the first one counts as ended: the first uses of the buffers do not wait.
        mbarrier.wait(k_empty.index(buffer), phase ^ 1)
        mbarrier.expect(k_full.index(buffer), k_rows.nbytes_per_cta)
        tma.async_copy_global_to_shared(k_rows, [start, 0], k_full.index(buffer), k_blocks.index(buffer))
        mbarrier.wait(v_empty.index(buffer), phase ^ 1)
        mbarrier.expect(v_full.index(buffer), v_rows.nbytes_per_cta)
        tma.async_copy_global_to_shared(v_rows, [start, 0], v_full.index(buffer), v_blocks.index(buffer))


@gluon.jit
def visible(column, stop, row_start, row_stop):
    """Return which columns the rows of a product see, in a masked block that ends before `stop`."""
    return (column[None, :] >= row_start[:, None]) & (column[None, :] < gl.minimum(row_stop, stop)[:, None])
