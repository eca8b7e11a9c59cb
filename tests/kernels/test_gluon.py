"""The Gluon kernels, run by a machine of threads and numpy, against attention by its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.gluon_machine import Machine, Pointer
from helpers.lanes import by_lane
from longring.kernels.attention import attention_backward, attention_forward, no_result, row_delta, zeros_fp32
from longring.kernels.layout import SeqLayout
from longring.kernels.mask import make_mask

S = 450  # three blocks of 192 queries, four of 128 keys, eight of 64 of either
PACKED = SeqLayout.packed((150, 1, 199, 100))
TILES = {
    "causal": (SeqLayout.contiguous(S), SeqLayout.contiguous(S), {}),
    "window, documents": (PACKED, PACKED, {"window": 70}),
    "some see no key": (SeqLayout(((100, 550),), (0, 120)), SeqLayout(((110, 400),), (0, 120)), {}),
}


@pytest.mark.parametrize("continues", [False, True])
@pytest.mark.parametrize("name", by_lane(list(TILES), quick=["window, documents"]))
def test_forward(name, continues):
    queries, keys, kind = TILES[name]
    mask = make_mask(queries, keys, **kind)
    generator = torch.Generator().manual_seed(0)
    n, m, d = queries.num_tokens, keys.num_tokens, 80
    q = torch.randn(1, n, 2, d, generator=generator).half()
    k, v = torch.randn(2, 1, m, 1, d, generator=generator).half()
    running = no_result(q)
    running[0].fill_(torch.nan)
    if continues:  # the queries have seen other keys, but for some
        running[0][:, 30:], running[1][:, :, 30:] = 0.25, 2.0
    out, lse = (running[0].clone(), running[1].clone()) if continues else (torch.empty_like(q), running[1].clone())
    expected = attention_forward(q, k, v, mask, running=running if continues else None, backend="reference")
    tensors = [Pointer(x.numpy().reshape(-1)) for x in (q, k, v, out, lse, mask.rows)]
    strides = [stride for x in (q, k, v, out) for stride in x.stride()[:3]]
    constants = {"HEAD_DIM": d, "BLOCK_D": 128, "BLOCK_M": 192, "BLOCK_N": 64, "CONTINUES": continues}
    constants |= {"SOFTCAP": False, "DESCRIPTORS": True}
    numbers = (*strides, *lse.stride()[:2], 2, 2, n, m, np.float32(d**-0.5), 0.0)
    Machine("gluon_forward").run("forward_kernel", -(-n // 192) * 2, *tensors, *numbers, **constants)
    # Probabilities are rounded to 16 bits before the second product, and out is if nothing is continued.
    torch.testing.assert_close(out.float(), expected[0].float(), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse, expected[1], rtol=1e-5, atol=1e-5)


WHOLE = (SeqLayout(((300, 520),)), SeqLayout.contiguous(270), {})
BACKWARD = {
    "causal": (TILES["causal"], (2, 1), torch.float16),
    "window, documents": (TILES["window, documents"], (4, 2), torch.float32),
    "some see no key": (TILES["some see no key"], (1, 1), torch.float32),
    "whole": (WHOLE, (3, 1), torch.float16),
}
"""Tiles, heads of queries and of keys, and the dtype of the gradients: fp32 ones are added to, others written."""


@pytest.mark.parametrize("name", by_lane(list(BACKWARD), quick=["window, documents"]))
def test_backward(name):
    (queries, keys, kind), (h, h_kv), dtype = BACKWARD[name]
    mask = make_mask(queries, keys, **kind)
    generator = torch.Generator().manual_seed(0)
    n, m, d = queries.num_tokens, keys.num_tokens, 80
    q, dout = torch.randn(2, 1, n, h, d, generator=generator).half()
    k, v = torch.randn(2, 1, m, h_kv, d, generator=generator).half()
    # The queries have seen other keys, but for some: lse and delta are those of the whole row.
    running = no_result(q)
    running[0][:, 30:], running[1][:, :, 30:] = 0.25, 2.0
    out, lse = attention_forward(q, k, v, mask, running=running, backend="reference")
    delta = row_delta(dout, out)
    exact = (zeros_fp32(q), zeros_fp32(k), zeros_fp32(v))
    attention_backward(dout, q, k, v, lse, delta, mask, into=exact, backend="reference")
    before = 0.5 if dtype == torch.float32 else torch.nan
    got = [torch.full_like(x, before, dtype=dtype) for x in exact]
    inputs, (dq, dk, dv), (rows, columns) = (
        [Pointer(x.numpy().reshape(-1)) for x in tensors]
        for tensors in ((q, k, v, dout, lse, delta), got, (mask.rows, mask.columns))
    )
    strides = [*(stride for x in (q, k, v, dout) for stride in x.stride()[:3]), *lse.stride()[:2]]
    constants = {"HEAD_DIM": d, "BLOCK_D": 128, "SOFTCAP": False, "DESCRIPTORS": True}
    numbers = (h // h_kv, n, m, np.float32(d**-0.5), 0.0)
    machine = Machine("gluon_backward")
    machine.run(
        "backward_dkdv_kernel", -(-m // 128) * h_kv, *inputs, dk, dv, columns,
        *strides, *k.stride()[:3], *v.stride()[:3], h_kv, *numbers, BLOCK_M=64, BLOCK_N=128, **constants,
    )  # fmt: skip
    machine.run(
        "backward_dq_kernel", -(-n // 128) * h, *inputs, dq, rows,
        *strides, *q.stride()[:3], h, *numbers, BLOCK_M=128, BLOCK_N=64, **constants,
    )  # fmt: skip
    # Probabilities and their gradients are rounded to 16 bits before the second product, and what is written is too.
    for found, expected in zip(got, exact, strict=True):
        sums = found - before if dtype == torch.float32 else found.float()
        torch.testing.assert_close(sums, expected, rtol=2e-3, atol=2e-3)
