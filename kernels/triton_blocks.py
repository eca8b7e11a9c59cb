"""Blocks of tensors as the kernels of `triton_kernels.py` read them: which ones a program owns and visits, and where.

16-bit inputs are read through tensor descriptors (DESCRIPTORS): TMA on Hopper and later, plain loads elsewhere.
Products of fp32 inputs do not run on tensor cores; read from shared memory in TMA's order they would spill registers,
so fp32 inputs are read by address. Offsets have 64 bits in both cases.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def program_index(num_rows, num_heads, BLOCK: tl.constexpr):
    """Return the block, batch and head of this program. There is one axis of programs: CUDA limits others to 65,535."""
    num_blocks = tl.cdiv(num_rows, BLOCK)
    sequence = tl.program_id(0) // num_blocks
    return tl.program_id(0) % num_blocks, sequence // num_heads, sequence % num_heads


@triton.jit
def loop_bounds(start_ptr, stop_ptr, first, last, STEP: tl.constexpr):
    """Return the bounds (left, full, right, end) of a program's loop, with left <= full <= right <= end.

    All rows first..last see [full, right), whose length is a multiple of STEP; some of them see [left, full) and
    [right, end), which are masked.
    """
    left = tl.load(start_ptr + first)
    full = tl.load(start_ptr + last)
    end = tl.load(stop_ptr + last)
    # If the last row begins beyond the end of the first, no key is seen by all rows: right = full.
    right = full + tl.maximum(tl.load(stop_ptr + first) - full, 0) // STEP * STEP
    return left, full, right, end


@triton.jit
def count_masked(left, full, right, end, STEP: tl.constexpr):
    """Return the number of blocks in the two masked parts."""
    return tl.cdiv(full - left, STEP) + tl.cdiv(end - right, STEP)


@triton.jit
def masked_block(i, left, full, right, end, STEP: tl.constexpr):
    """Return the start of masked block i, counted over the left part and then the right, and the end of its part."""
    num_left = tl.cdiv(full - left, STEP)
    is_left = i < num_left
    return tl.where(is_left, left + i * STEP, right + (i - num_left) * STEP), tl.where(is_left, full, end)


@triton.jit
def aligned(ptr, stride):
    """Return a stride of elements, which is a multiple of 16 bytes, in a form from which the compiler sees that it is.

    Without it each load from global memory would be cut into single elements.
    """
    unit: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    return stride // unit * unit


@triton.jit
def all_aligned(ptr, strides):
    """Return `aligned` of strides (b, s, h)."""
    return (aligned(ptr, strides[0]), aligned(ptr, strides[1]), aligned(ptr, strides[2]))


@triton.jit
def head_rows(
    ptr, strides, batch, head, num_rows,
    DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, DESCRIPTORS: tl.constexpr = True,
):  # fmt: skip
    """Return one head of a `[b, s, h, d]` tensor with strides (b, s, h) as a two-dim view for `load_rows`."""
    if DESCRIPTORS:
        steps = all_aligned(ptr, strides)
        base = ptr + batch.to(tl.int64) * steps[0] + head.to(tl.int64) * steps[2]
        return tl.make_tensor_descriptor(base, [num_rows, DIM], [steps[1], 1], [ROWS, WIDTH])
    else:
        return (ptr, strides, batch, head, num_rows)


@triton.jit
def load_rows(rows, start, DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """Return the block `[ROWS, WIDTH]` from row `start` on; elements beyond the edges are 0."""
    if DESCRIPTORS:
        return rows.load([start, 0])
    else:
        row, dims = start + tl.arange(0, ROWS), tl.arange(0, WIDTH)
        inside = (row < rows[4])[:, None] & (dims < DIM)[None, :]
        return tl.load(pointers(rows[0], rows[1], rows[2], rows[3], row, dims), mask=inside, other=0.0)


@triton.jit
def add_rows(ptr, rows, start, block):
    """Add an fp32 block to the rows from `start` on of a view of the tensor at ptr; write it if that is 16 bit."""
    if ptr.dtype.element_ty == tl.float32:
        rows.store([start, 0], rows.load([start, 0]) + block)
    else:
        rows.store([start, 0], block.to(ptr.dtype.element_ty))


@triton.jit
def all_heads(
    ptr, strides, batch, num_heads, num_rows,
    DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Return all heads of a `[b, s, h, d]` tensor with strides (b, s, h) as a three-dim view for `load_head`.

    Blocks of this view must be reshaped. As the second factor of a product a reshaped block stays in shared memory; as
    the first factor Triton would pass it through registers, which are scarce, so `head_rows` reads first factors.
    """
    if DESCRIPTORS:
        steps = all_aligned(ptr, strides)
        base = ptr + batch.to(tl.int64) * steps[0]
        return tl.make_tensor_descriptor(base, [num_heads, num_rows, DIM], [steps[2], steps[1], 1], [1, ROWS, WIDTH])
    else:
        return (ptr, strides, batch, num_rows)


@triton.jit
def load_head(
    heads, head, start, DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, DESCRIPTORS: tl.constexpr
):  # fmt: skip
    """Return the block `[ROWS, WIDTH]` of one head, from row `start` on."""
    if DESCRIPTORS:
        return heads.load([head, start, 0]).reshape(ROWS, WIDTH)  # [1, ROWS, WIDTH] -> [ROWS, WIDTH]
    else:
        rows = (heads[0], heads[1], heads[2], head, heads[3])
        return load_rows(rows, start, DIM, ROWS, WIDTH, False)


@triton.jit
def pointers(ptr, strides, batch, head, row, dims):
    """Return the 64-bit addresses `[rows, dims]` of rows of one head of a `[b, s, h, d]` tensor, strides (b, s, h)."""
    steps = all_aligned(ptr, strides)
    base = ptr + batch.to(tl.int64) * steps[0] + head.to(tl.int64) * steps[2]
    return base + row.to(tl.int64)[:, None] * steps[1] + dims[None, :]
