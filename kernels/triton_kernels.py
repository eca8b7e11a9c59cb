"""The Triton kernels, which `triton_attention.py` launches.

Forward and backward are FlashAttention-2 (arXiv 2307.08691) on interval masks. Each program of the forward owns a block
of queries, rows first..last, and loops over the keys that they see. Four integers of the mask divide the loop into
three parts before it starts:

    k_start[first] .. k_start[last]   some rows of the block see these keys: masked
    k_start[last]  .. k_stop[first]   all rows see these keys: not masked, whole blocks of keys only
    ... the rest   .. k_stop[last]    some rows see these keys: masked

Other keys are not visited. The backward has two kernels, so that no sum is atomic and equal runs are bit-equal. The dQ
kernel owns a block of queries, like the forward. The dK, dV kernel owns a block of keys, loops over the queries that
see them (the same three parts, from the mask's columns), sums over the query heads of its group and adds dK and dV
once. Gradients are added to fp32 buffers; 16-bit buffers are for gradients that nothing is added to, and are written.

All sums are fp32; probabilities enter the second product in the inputs' dtype.

A kernel is compiled once for each dtype, head dim, block size and flag. Triton would also compile it anew for lengths
and strides that are 1 or multiples of 16, which differ from micro-batch to micro-batch where documents do: `VARYING`
names the arguments that it must take as they come. Strides are passed one by one, because Triton specializes what is
inside a tuple in any case. `scale` and `softcap` have a type, because it would take a whole number for an integer.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_blocks import (
    add_rows,
    aligned,
    all_heads,
    count_masked,
    head_rows,
    load_head,
    load_rows,
    loop_bounds,
    masked_block,
    pointers,
    program_index,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

VARYING = ["s_q", "s_k", "num_heads", "num_kv_heads", "group", "num_parts", "rows", "columns", "lse", "delta"]
VARYING += ["part_lses", *(f"{x}_{dim}" for x in ("q", "k", "v", "out", "dout", "dq", "dk", "dv") for dim in "bsh")]
VARYING += ["lse_b", "lse_h", *(f"{x}_{dim}" for x in ("part_out", "part_lse") for dim in "nbsh")]
"""Arguments for whose values no kernel is compiled anew. Other pointers are always multiples of 16 bytes, which
`triton_attention` sees to; stride `x_b` is that of dim b of x, in elements."""


@triton.jit
def _capped(scores, softcap):
    """Return c tanh(s / c) and its derivative with respect to s, for scores s and softcap c.

    Up to |s / c| = 2 tanh is its continued fraction, cut after seven terms (error below 2e-8). Beyond, it is computed
    by exp2, which saturates without overflow but would lose digits where tanh is small.
    """
    x = scores / softcap
    y = x * x  # the fraction is x times a ratio of polynomials in x^2
    fraction = (135135 + y * (17325 + y * (378 + y))) / (135135 + y * (62370 + y * (3150 + y * 28)))
    t = tl.where(y < 4, x * fraction, 1 - 2 / (1 + tl.exp2(x * (2 * LOG2E))))
    return softcap * t, 1 - t * t


@triton.jit
def _forward_step(
    acc, peak, total, q, k_rows, v_rows, start, end, row_start, row_stop, scale, softcap,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Add one block of keys to (acc, peak, total), the running result of a block of queries; peak is a log2."""
    k = load_rows(k_rows, start, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS)
    scores = tl.dot(q, k.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    if SOFTCAP:
        scores, factor = _capped(scores * scale, softcap)[0], LOG2E
    else:
        factor = scale * LOG2E
    if MASKED:
        keys = start + tl.arange(0, BLOCK_N)
        visible = (keys[None, :] >= row_start[:, None]) & (keys[None, :] < tl.minimum(row_stop, end)[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    # The maximum is taken before the factor, which then costs nothing: it is part of the subtraction below.
    new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
    if MASKED:
        # A row that has seen no key yet has peak -inf: base 0 avoids the nan of -inf - -inf.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    else:
        base = new_peak
    # Invariant: acc = sum of exp2(score - peak) v and total = sum of exp2(score - peak), over the keys so far.
    p = tl.exp2(scores * factor - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(p, 1)
    v = load_rows(v_rows, start, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_peak, total


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    q, k, v, out, lse, rows,
    q_b: tl.int64, q_s: tl.int64, q_h: tl.int64, k_b: tl.int64, k_s: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_s: tl.int64, v_h: tl.int64, out_b: tl.int64, out_s: tl.int64, out_h: tl.int64,
    lse_b: tl.int64, lse_h: tl.int64, num_heads, group, s_q, s_k, scale: tl.float32, softcap: tl.float32,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CONTINUES: tl.constexpr, SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Write out and lse of a block of queries; programs are batch x heads x blocks of queries.

    With CONTINUES, out (fp32) and lse hold a running result, which the program extends.
    """
    # Later queries see more keys: blocks are taken from the last one, so that the longest programs start first.
    block, batch, head = program_index(s_q, num_heads, BLOCK_M)
    first = (tl.cdiv(s_q, BLOCK_M) - 1 - block) * BLOCK_M
    kv_head = head // group
    row = first + tl.arange(0, BLOCK_M)
    inside = row < s_q
    row_start = tl.load(rows + row, mask=inside, other=0)
    row_stop = tl.load(rows + s_q + row, mask=inside, other=0)
    lse_ptrs = lse + batch.to(tl.int64) * lse_b + head.to(tl.int64) * lse_h + row
    out_rows = head_rows(out, (out_b, out_s, out_h), batch, head, s_q, HEAD_DIM, BLOCK_M, BLOCK_D)

    if CONTINUES:
        # A running result is one key of score lse and value out: peak = lse, total = 1, acc = out.
        peak = tl.load(lse_ptrs, mask=inside, other=float("-inf")) * LOG2E
        seen = peak > float("-inf")
        total = tl.where(seen, 1.0, 0.0)
        # The out of a row that has seen no key is uninitialized, perhaps nan.
        acc = tl.where(seen[:, None], out_rows.load([first, 0]), 0.0)
    else:
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # [BLOCK_M, BLOCK_D], held for the whole loop
    q_block = load_rows(
        head_rows(q, (q_b, q_s, q_h), batch, head, s_q, HEAD_DIM, BLOCK_M, BLOCK_D, DESCRIPTORS), first,
        HEAD_DIM, BLOCK_M, BLOCK_D, DESCRIPTORS,
    )  # fmt: skip
    k_rows = head_rows(k, (k_b, k_s, k_h), batch, kv_head, s_k, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS)
    v_rows = head_rows(v, (v_b, v_s, v_h), batch, kv_head, s_k, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS)
    last = tl.minimum(first + BLOCK_M, s_q) - 1
    left, full, right, end = loop_bounds(rows, rows + s_q, first, last, BLOCK_N)
    for start in tl.range(full, right, BLOCK_N):
        acc, peak, total = _forward_step(
            acc, peak, total, q_block, k_rows, v_rows, start, end, row_start, row_stop, scale, softcap,
            False, SOFTCAP, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS,
        )  # fmt: skip
    for i in tl.range(0, count_masked(left, full, right, end, BLOCK_N)):
        start, stop = masked_block(i, left, full, right, end, BLOCK_N)
        acc, peak, total = _forward_step(
            acc, peak, total, q_block, k_rows, v_rows, start, stop, row_start, row_stop, scale, softcap,
            True, SOFTCAP, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS,
        )  # fmt: skip

    seen = total > 0
    acc = acc / tl.where(seen, total, 1.0)[:, None]
    out_rows.store([first, 0], acc.to(out.dtype.element_ty))
    tl.store(lse_ptrs, tl.where(seen, (peak + tl.log2(total)) * LN2, float("-inf")), mask=inside)


@triton.jit
def _probabilities(products, lse, visible, scale, softcap, MASKED: tl.constexpr, SOFTCAP: tl.constexpr):
    """Return p and the softcap's slope for products q k; lse is `[rows, 1]` or `[1, rows]`, as queries lie in them."""
    slope = 1.0
    if SOFTCAP:
        scores, slope = _capped(products * scale, softcap)
        p = tl.exp2((scores - lse) * LOG2E)
    else:
        p = tl.exp2(products * (scale * LOG2E) - lse * LOG2E)
    if MASKED:
        p = tl.where(visible, p, 0.0)
    return p, slope


@triton.jit
def _dkdv_step(
    dk, dv, k, v, q_heads, dout_heads, lse_ptr, delta_ptr, lse_strides, batch, head, start, end, s_q,
    column_start, column_stop, scale, softcap,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Add the gradients from one block of queries to dk and dv of a block of keys."""
    row = start + tl.arange(0, BLOCK_M)
    # A row beyond the edge reads lse inf, which makes its probabilities 0.
    offset = batch.to(tl.int64) * lse_strides[0] + head.to(tl.int64) * lse_strides[1]
    lse = tl.load(lse_ptr + offset + row, mask=row < s_q, other=float("inf"))
    delta = tl.load(delta_ptr + offset + row, mask=row < s_q, other=0.0)
    q = load_head(q_heads, head, start, HEAD_DIM, BLOCK_M, BLOCK_D, DESCRIPTORS)
    dout = load_head(dout_heads, head, start, HEAD_DIM, BLOCK_M, BLOCK_D, DESCRIPTORS)
    visible = (row[None, :] >= column_start[:, None]) & (row[None, :] < tl.minimum(column_stop, end)[:, None])
    products = tl.dot(k, q.T, input_precision="ieee")  # [BLOCK_N, BLOCK_M], transposed: a row per key
    p, slope = _probabilities(products, lse[None, :], visible, scale, softcap, MASKED, SOFTCAP)
    # dv before dp, so that p is narrowed to 16 bit before dp needs registers.
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
    ds = p * (tl.dot(v, dout.T, input_precision="ieee") - delta[None, :])
    if SOFTCAP:
        ds = ds * slope
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=VARYING)
def backward_dkdv_kernel(
    q, k, v, dout, lse, delta, dk, dv, columns,
    q_b: tl.int64, q_s: tl.int64, q_h: tl.int64, k_b: tl.int64, k_s: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_s: tl.int64, v_h: tl.int64, dout_b: tl.int64, dout_s: tl.int64, dout_h: tl.int64,
    lse_b: tl.int64, lse_h: tl.int64, dk_b: tl.int64, dk_s: tl.int64, dk_h: tl.int64,
    dv_b: tl.int64, dv_s: tl.int64, dv_h: tl.int64,
    num_kv_heads, group, s_q, s_k, scale: tl.float32, softcap: tl.float32,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv of a block of keys, or write them; programs are batch x kv heads x blocks of keys.

    They are sums in fp32, or 16-bit memory to be written. lse and delta must have equal strides.
    """
    block, batch, kv_head = program_index(s_k, num_kv_heads, BLOCK_N)
    first = block * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    inside = column < s_k
    column_start = tl.load(columns + column, mask=inside, other=0)
    column_stop = tl.load(columns + s_k + column, mask=inside, other=0)
    # Both [BLOCK_N, BLOCK_D], held for the whole loop
    k_block = load_rows(
        head_rows(k, (k_b, k_s, k_h), batch, kv_head, s_k, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS), first,
        HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS,
    )  # fmt: skip
    v_block = load_rows(
        head_rows(v, (v_b, v_s, v_h), batch, kv_head, s_k, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS), first,
        HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS,
    )  # fmt: skip
    q_heads = all_heads(q, (q_b, q_s, q_h), batch, num_kv_heads * group, s_q, HEAD_DIM, BLOCK_M, BLOCK_D, DESCRIPTORS)
    dout_heads = all_heads(
        dout, (dout_b, dout_s, dout_h), batch, num_kv_heads * group, s_q, HEAD_DIM, BLOCK_M, BLOCK_D, DESCRIPTORS
    )
    dk_block = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_block = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    last = tl.minimum(first + BLOCK_N, s_k) - 1
    left, full, right, end = loop_bounds(columns, columns + s_k, first, last, BLOCK_M)
    # One loop over the blocks of all query heads of the group (head major), so that the pipeline does not drain
    # between heads. First the masked blocks, then the others: each loop is compiled for one kind.
    num_masked = count_masked(left, full, right, end, BLOCK_M)
    for i in tl.range(0, group * num_masked):
        head = kv_head * group + i // num_masked
        start, stop = masked_block(i % num_masked, left, full, right, end, BLOCK_M)
        dk_block, dv_block = _dkdv_step(
            dk_block, dv_block, k_block, v_block, q_heads, dout_heads, lse, delta, (lse_b, lse_h), batch, head, start,
            stop, s_q, column_start, column_stop, scale, softcap,
            True, SOFTCAP, HEAD_DIM, BLOCK_M, BLOCK_D, DESCRIPTORS,
        )  # fmt: skip
    num_full = (right - full) // BLOCK_M
    for i in tl.range(0, group * num_full):
        head, start = kv_head * group + i // num_full, full + i % num_full * BLOCK_M
        dk_block, dv_block = _dkdv_step(
            dk_block, dv_block, k_block, v_block, q_heads, dout_heads, lse, delta, (lse_b, lse_h), batch, head, start,
            end, s_q, column_start, column_stop, scale, softcap,
            False, SOFTCAP, HEAD_DIM, BLOCK_M, BLOCK_D, DESCRIPTORS,
        )  # fmt: skip

    # A single program owns these rows, so it adds to them without atomics.
    dk_rows = head_rows(dk, (dk_b, dk_s, dk_h), batch, kv_head, s_k, HEAD_DIM, BLOCK_N, BLOCK_D)
    add_rows(dk, dk_rows, first, dk_block * scale)
    dv_rows = head_rows(dv, (dv_b, dv_s, dv_h), batch, kv_head, s_k, HEAD_DIM, BLOCK_N, BLOCK_D)
    add_rows(dv, dv_rows, first, dv_block)


@triton.jit
def _dq_step(
    dq, q, dout, lse, delta, k_rows, v_rows, start, end, row_start, row_stop, scale, softcap,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Return dq of a block of queries with the gradients from one block of keys added."""
    k = load_rows(k_rows, start, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS)
    v = load_rows(v_rows, start, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS)
    keys = start + tl.arange(0, BLOCK_N)
    visible = (keys[None, :] >= row_start[:, None]) & (keys[None, :] < tl.minimum(row_stop, end)[:, None])
    products = tl.dot(q, k.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    p, slope = _probabilities(products, lse[:, None], visible, scale, softcap, MASKED, SOFTCAP)
    ds = p * (tl.dot(dout, v.T, input_precision="ieee") - delta[:, None])
    if SOFTCAP:
        ds = ds * slope
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=VARYING)
def backward_dq_kernel(
    q, k, v, dout, lse, delta, dq, rows,
    q_b: tl.int64, q_s: tl.int64, q_h: tl.int64, k_b: tl.int64, k_s: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_s: tl.int64, v_h: tl.int64, dout_b: tl.int64, dout_s: tl.int64, dout_h: tl.int64,
    lse_b: tl.int64, lse_h: tl.int64, dq_b: tl.int64, dq_s: tl.int64, dq_h: tl.int64,
    num_heads, group, s_q, s_k, scale: tl.float32, softcap: tl.float32,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Add to dq (fp32) of a block of queries, or write it (16 bit); programs are batch x heads x blocks of queries."""
    # From the last block, as in the forward: the longest programs start first.
    block, batch, head = program_index(s_q, num_heads, BLOCK_M)
    first = (tl.cdiv(s_q, BLOCK_M) - 1 - block) * BLOCK_M
    kv_head = head // group
    row = first + tl.arange(0, BLOCK_M)
    inside = row < s_q
    row_start = tl.load(rows + row, mask=inside, other=0)
    row_stop = tl.load(rows + s_q + row, mask=inside, other=0)
    offset = batch.to(tl.int64) * lse_b + head.to(tl.int64) * lse_h
    lse_row = tl.load(lse + offset + row, mask=inside, other=float("inf"))
    delta_row = tl.load(delta + offset + row, mask=inside, other=0.0)
    q_block = load_rows(
        head_rows(q, (q_b, q_s, q_h), batch, head, s_q, HEAD_DIM, BLOCK_M, BLOCK_D, DESCRIPTORS), first,
        HEAD_DIM, BLOCK_M, BLOCK_D, DESCRIPTORS,
    )  # fmt: skip
    dout_block = load_rows(
        head_rows(dout, (dout_b, dout_s, dout_h), batch, head, s_q, HEAD_DIM, BLOCK_M, BLOCK_D, DESCRIPTORS), first,
        HEAD_DIM, BLOCK_M, BLOCK_D, DESCRIPTORS,
    )  # fmt: skip
    k_rows = head_rows(k, (k_b, k_s, k_h), batch, kv_head, s_k, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS)
    v_rows = head_rows(v, (v_b, v_s, v_h), batch, kv_head, s_k, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS)
    dq_block = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    last = tl.minimum(first + BLOCK_M, s_q) - 1
    left, full, right, end = loop_bounds(rows, rows + s_q, first, last, BLOCK_N)
    for start in tl.range(full, right, BLOCK_N):
        dq_block = _dq_step(
            dq_block, q_block, dout_block, lse_row, delta_row, k_rows, v_rows, start, end, row_start, row_stop,
            scale, softcap, False, SOFTCAP, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS,
        )  # fmt: skip
    for i in tl.range(0, count_masked(left, full, right, end, BLOCK_N)):
        start, stop = masked_block(i, left, full, right, end, BLOCK_N)
        dq_block = _dq_step(
            dq_block, q_block, dout_block, lse_row, delta_row, k_rows, v_rows, start, stop, row_start, row_stop,
            scale, softcap, True, SOFTCAP, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS,
        )  # fmt: skip

    dq_rows = head_rows(dq, (dq_b, dq_s, dq_h), batch, head, s_q, HEAD_DIM, BLOCK_M, BLOCK_D)
    add_rows(dq, dq_rows, first, dq_block * scale)


@triton.jit(do_not_specialize=VARYING)
def delta_kernel(
    dout, out, delta, dout_b: tl.int64, dout_s: tl.int64, dout_h: tl.int64,
    out_b: tl.int64, out_s: tl.int64, out_h: tl.int64, num_heads, s_q,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write delta[b, h, i] = sum over d of dout out, contiguous; programs are batch x heads x blocks of queries."""
    block, batch, head = program_index(s_q, num_heads, BLOCK_M)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    read = (row < s_q)[:, None] & (dims < HEAD_DIM)[None, :]
    dout_ptrs = pointers(dout, (dout_b, dout_s, dout_h), batch, head, row, dims)
    out_ptrs = pointers(out, (out_b, out_s, out_h), batch, head, row, dims)
    dout_block = tl.load(dout_ptrs, mask=read, other=0.0).to(tl.float32)
    out_block = tl.load(out_ptrs, mask=read, other=0.0).to(tl.float32)
    delta_ptrs = delta + (batch.to(tl.int64) * num_heads + head) * s_q + row
    tl.store(delta_ptrs, tl.sum(dout_block * out_block, 1), mask=row < s_q)


@triton.jit(do_not_specialize=VARYING)
def merge_kernel(
    out, lse, part_outs, part_lses, out_b: tl.int64, out_s: tl.int64, out_h: tl.int64, lse_b: tl.int64, lse_h: tl.int64,
    part_out_n: tl.int64, part_out_b: tl.int64, part_out_s: tl.int64, part_out_h: tl.int64,
    part_lse_n: tl.int64, part_lse_b: tl.int64, part_lse_h: tl.int64, num_parts, num_heads, s_q,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Merge num_parts partial results into the running one; programs are batch x heads x blocks of queries.

    Strides `_n` are those between parts.
    """
    block, batch, head = program_index(s_q, num_heads, BLOCK_M)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    inside = row < s_q
    stored = inside[:, None] & (dims < HEAD_DIM)[None, :]
    out_ptrs = pointers(out, (out_b, out_s, out_h), batch, head, row, dims)
    part_ptrs = pointers(part_outs, (part_out_b, part_out_s, part_out_h), batch, head, row, dims)
    lse_ptrs = lse + batch.to(tl.int64) * lse_b + head.to(tl.int64) * lse_h + row
    part_lse_ptrs = part_lses + batch.to(tl.int64) * part_lse_b + head.to(tl.int64) * part_lse_h + row
    peak = tl.load(lse_ptrs, mask=inside, other=float("-inf"))
    seen = peak > float("-inf")
    total = tl.where(seen, 1.0, 0.0)
    acc = tl.load(out_ptrs, mask=stored & seen[:, None], other=0.0)
    step = aligned(part_outs, part_out_n)
    # Invariant: acc = sum of exp(lse - peak) out and total = sum of exp(lse - peak), over the results so far.
    for _ in range(num_parts):
        part_lse = tl.load(part_lse_ptrs, mask=inside, other=float("-inf"))
        new_peak = tl.maximum(peak, part_lse)
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight, shrink = tl.exp2((part_lse - base) * LOG2E), tl.exp2((peak - base) * LOG2E)
        # A part that has seen no key has weight 0, and its out is not read.
        part = tl.load(part_ptrs, mask=stored & (weight > 0)[:, None], other=0.0).to(tl.float32)
        acc = acc * shrink[:, None] + part * weight[:, None]
        total = total * shrink + weight
        peak = new_peak
        part_ptrs += step
        part_lse_ptrs += part_lse_n
    seen = total > 0
    tl.store(out_ptrs, acc / tl.where(seen, total, 1.0)[:, None], mask=stored)
    tl.store(lse_ptrs, tl.where(seen, peak + tl.log2(total) * LN2, float("-inf")), mask=inside)
