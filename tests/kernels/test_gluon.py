"""The Gluon forward, run by a machine of threads and numpy, against attention by its definition."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.gluon_machine import Machine, Pointer
from helpers.lanes import by_lane
from longring.kernels.attention import attention_forward, no_result
from longring.kernels.layout import SeqLayout
from longring.kernels.mask import make_mask

S = 450  # three blocks of 192 queries, eight of 64 keys
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
    numbers = (*strides, *lse.stride()[:2], 2, 2, n, m, np.float32(d**-0.5), 0.0)
    Machine("gluon_kernels").run(-(-n // 192) * 2, *tensors, *numbers, **constants, SOFTCAP=False, DESCRIPTORS=True)
    # Probabilities are rounded to 16 bits before the second product, and out is if nothing is continued.
    torch.testing.assert_close(out.float(), expected[0].float(), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse, expected[1], rtol=1e-5, atol=1e-5)


COMPILE = """
import triton
from lib.sass import Code
from longring.kernels.gluon_kernels import BLOCKS, forward_kernel
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

for head_dim, continues in ((128, False), (128, True), (64, False)):
    constants = {"HEAD_DIM": head_dim, "BLOCK_D": head_dim, "BLOCK_M": BLOCKS.block_m, "BLOCK_N": BLOCKS.block_n}
    constants |= {"CONTINUES": continues, "SOFTCAP": False, "DESCRIPTORS": True}
    types = dict.fromkeys(("q", "k", "v"), "*bf16") | {"out": "*fp32" if continues else "*bf16", "lse": "*fp32"}
    types |= {"rows": "*i32", "scale": "fp32", "softcap": "fp32"} | dict.fromkeys(constants, "constexpr")
    for name in forward_kernel.arg_names:
        types.setdefault(name, "i64" if name[-2:] in ("_b", "_s", "_h") else "i32")
    types = {name: types[name] for name in forward_kernel.arg_names}
    attributes = {(number,): [["tt.divisibility", 16]] for number in (0, 1, 2, 3, 5)}
    source = GluonASTSource(forward_kernel, types, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": BLOCKS.num_warps})
    names = [one.name for one in Code.of(compiled.asm["cubin"]).instructions]
    assert compiled.metadata.shared <= 232_448
    assert any(name.startswith("HGMMA") for name in names)
    assert not any(name.startswith(("LDL", "STL")) for name in names), "spills"
"""


@pytest.mark.slow
def test_compiles_for_hopper():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2] / "benchmarks")
    done = subprocess.run([sys.executable, "-P", "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
