"""RMSNorm, SwiGLU and RoPE of both implementations against their formulas in fp64, gradients included.

Without a GPU, liger's kernels run in Triton's interpreter. It must be enabled before they are imported, so a separate
process runs this file as a script.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from helpers.errors import assert_as_exact_as
from longring.model.fused import LIGER, TORCH, FusedOps, fused_ops
from torch import Tensor

EPSILON = 1e-5
OPERATORS = ("rms_norm", "swiglu", "rope")
DTYPES = (torch.float32, torch.bfloat16)
INTERPRETED_DTYPES = (torch.float32, torch.float16)  # the interpreter multiplies bf16 as integers and truncates to it
FACTOR = 3


def inputs(operator: str) -> list[Tensor]:
    """Return the differentiable arguments, with odd sizes and values that bf16 represents exactly."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator).bfloat16().float()  # noqa: E731
    if operator == "rms_norm":
        return [5 * randn(7, 3, 48) + 1, randn(48)]
    if operator == "swiglu":
        return [3 * randn(7, 3, 2 * 40)]
    return [randn(2, 9, 6, 24), randn(2, 9, 3, 24)]


def table() -> tuple[Tensor, Tensor]:
    angles = 100 * torch.rand(9, 12, generator=torch.Generator().manual_seed(1))
    return angles.cos(), angles.sin()


def written_out(operator: str, *args: Tensor) -> list[Tensor]:
    """Return the results of the formula, computed in the dtype of the arguments."""
    if operator == "rms_norm":
        x, weight = args
        return [x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight]
    if operator == "swiglu":
        gate, up = args[0][..., :40], args[0][..., 40:]
        return [gate / (1 + (-gate).exp()) * up]
    turn = torch.complex(*(t.to(args[0].dtype) for t in table()))[:, None]
    turned = [torch.complex(x[..., :12], x[..., 12:]) * turn for x in args]
    return [torch.cat([x.real, x.imag], -1) for x in turned]


def implemented(ops: FusedOps, operator: str, *args: Tensor) -> list[Tensor]:
    if operator == "rms_norm":
        x, weight = args
        return [ops.rms_norm(x, weight, EPSILON)]
    if operator == "swiglu":
        return [ops.swiglu(*args)]
    # RoPE may overwrite its arguments, so it gets copies.
    q, k = (x * 1 for x in args)
    cos, sin = (t.to(q.device) for t in table())
    return list(ops.rope(q, k, (cos, sin)))


def with_gradients(function, operator: str, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    args = [x.to(device, dtype).requires_grad_() for x in inputs(operator)]
    outs = function(operator, *args)
    generator = torch.Generator().manual_seed(2)
    douts = [torch.randn(out.shape, generator=generator).bfloat16().to(device, out.dtype) for out in outs]
    kept = [dout.clone() for dout in douts]
    grads = torch.autograd.grad(outs, args, douts)
    if operator != "rope":
        assert all(torch.equal(*pair) for pair in zip(douts, kept, strict=True)), (
            "the backward overwrote the gradient that it received"
        )
    assert all(x.dtype == dtype for x in (*outs, *grads))
    results = {f"out{i}": out for i, out in enumerate(outs)} | {f"d{i}": grad for i, grad in enumerate(grads)}
    return {name: result.detach().cpu() for name, result in results.items()}


def operators_of(ops: FusedOps):
    return lambda operator, *args: implemented(ops, operator, *args)


def check(got: dict[str, Tensor], operator: str, dtype: torch.dtype) -> None:
    """Assert that the results err at most FACTOR times as much as the formula in fp32, rounded once to dtype."""
    exact = with_gradients(written_out, operator, torch.float64)
    plain = {name: x.to(dtype) for name, x in with_gradients(written_out, operator, torch.float32).items()}
    assert_as_exact_as(got, plain, exact, FACTOR)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[tuple[str, torch.dtype], dict[str, Tensor]]:
    path = tmp_path_factory.mktemp("liger") / "results.pt"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-W", "ignore", __file__, path], check=True, env=environment)
    return torch.load(path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_torch_equals_the_formula(operator, dtype):
    check(with_gradients(operators_of(TORCH), operator, dtype), operator, dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_liger_interpreted_equals_the_formula(interpreted, operator, dtype):
    check(interpreted[operator, dtype], operator, dtype)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU; without one, liger runs in Triton's interpreter"
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_liger_equals_the_formula(operator, dtype):
    check(with_gradients(operators_of(LIGER), operator, dtype, "cuda"), operator, dtype)


def test_device_selects_the_implementation():
    assert fused_ops(torch.empty(1)) is TORCH
    if torch.cuda.is_available():
        assert fused_ops(torch.empty(1, device="cuda")) is LIGER


def interpret_liger(path: str) -> None:
    """Run all cases and save the results, with two additions that the interpreter of Triton 3.7 lacks."""
    import liger_kernel.ops.rms_norm
    import triton.language as tl
    from triton.runtime import interpreter

    plain_cvt = interpreter._implicit_cvt

    def scalar(arg):
        """Convert a float argument to an fp32 scalar with tensor methods, as compiled kernels do."""
        if isinstance(arg, float):
            return tl.tensor(interpreter.TensorHandle(torch.tensor([arg]).numpy(), tl.float32), tl.float32)
        return plain_cvt(arg)

    interpreter._implicit_cvt = scalar
    liger_kernel.ops.rms_norm.rsqrt = lambda x: tl.rsqrt(x)  # libdevice's rsqrt has no body to interpret
    torch.save({(o, d): with_gradients(operators_of(LIGER), o, d) for o in OPERATORS for d in INTERPRETED_DTYPES}, path)


if __name__ == "__main__":
    interpret_liger(sys.argv[1])
