"""The error measure of all tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def relative_rms(got: Tensor, exact: Tensor) -> float:
    """Return the root mean square of the error over that of the exact fp64 tensor."""
    assert got.shape == exact.shape, f"{tuple(got.shape)} is not {tuple(exact.shape)}"
    scale = exact.double().square().mean().sqrt()
    error = (got.double() - exact.double()).square().mean().sqrt()
    assert torch.isfinite(error), "not finite"
    return float(error / scale) if scale > 0 else float(error)


def assert_as_exact_as(
    got: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], factor: float, what: str = ""
):
    """Assert that each tensor errs at most `factor` times as much as plain torch in the same dtype."""
    assert got.keys() == plain.keys() == exact.keys()
    for name in exact:
        error, yardstick = relative_rms(got[name], exact[name]), relative_rms(plain[name], exact[name])
        assert error <= factor * yardstick, f"{what} {name}: error {error:.3g} against {yardstick:.3g} of plain torch"


def gradient(tensor: Tensor) -> Tensor:
    """Return a tensor's gradient, which a backward pass must have left."""
    assert tensor.grad is not None
    return tensor.grad


def with_gradients(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    dtype: torch.dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
) -> dict[str, Tensor]:
    """Return out, dq, dk and dv of an attention function computed in `dtype`."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    out = attention(q, k, v)
    out.backward(dout.to(dtype))
    return {"out": out.detach(), "dq": gradient(q), "dk": gradient(k), "dv": gradient(v)}


def refused(call: Callable[[], object]) -> str:
    """Return the message of the ValueError with advice that a call raises."""
    with pytest.raises(ValueError, match="; ") as caught:
        call()
    return str(caught.value)
