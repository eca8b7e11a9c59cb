"""Merging of partial results in place: any number of parts, with rows that have seen no key."""

from __future__ import annotations

import os

import pytest
import torch
from longring.kernels import merge, triton_attention
from longring.kernels.attention import row_delta

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MERGES = {"torch": merge.merge_, "triton": triton_attention.merge_}
if DEVICE == "cuda":
    del MERGES["torch"]  # on CUDA `merge.merge_` launches the Triton kernel


def exact_merge(outs: list[torch.Tensor], lses: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    lse = torch.stack(lses).double()
    weights = lse.softmax(0).nan_to_num(0.0)
    out = torch.stack(
        [w.transpose(1, 2).unsqueeze(-1) * o.double().nan_to_num(0.0) for w, o in zip(weights, outs, strict=True)]
    )
    return out.sum(0), lse.logsumexp(0)


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("num_parts", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ["adjacent", "apart"])
def test_merge_equals_softmax_over_parts(name, num_parts, dtype, rows):
    generator = torch.Generator().manual_seed(num_parts)
    out = torch.randn((2, 37, 3, 80), generator=generator).to(DEVICE)
    lse = (4 * torch.randn((2, 3, 37), generator=generator)).to(DEVICE)
    parts = torch.randn((num_parts, 2, 37, 3, 80), generator=generator).to(DEVICE, dtype)
    part_lses = (4 * torch.randn((num_parts, 2, 3, 37), generator=generator)).to(DEVICE)
    lse[:, :, :5] = -torch.inf  # these rows have seen no key yet, so their out is arbitrary
    out[:, :5] = torch.nan
    part_lses[0, :, :, 3:9] = -torch.inf  # these rows see no key in the first part
    parts[0, :, 3:9] = torch.nan
    exact, exact_lse = exact_merge([out, *parts], [lse, *part_lses])
    if rows == "apart":  # the memory of [n, b, s, h]
        part_lses = part_lses.transpose(2, 3).contiguous().transpose(2, 3)
    MERGES[name](out, lse, parts, part_lses)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MERGES)
def test_extreme_weights_do_not_overflow(name):
    """A part of weight 0 leaves the running result unchanged, and a part of weight 1 replaces it."""
    out, part = torch.ones((1, 3, 1, 16), device=DEVICE), torch.full((1, 1, 3, 1, 16), 5.0, device=DEVICE)
    lse = torch.tensor([[[0.0, 1e4, -1e4]]], device=DEVICE)
    MERGES[name](out, lse, part, torch.tensor([[[[0.0, -1e4, 1e4]]]], device=DEVICE))
    torch.testing.assert_close(out[0, :, 0, 0].cpu(), torch.tensor([3.0, 1.0, 5.0]))
    torch.testing.assert_close(lse.cpu(), torch.tensor([[[0.6931472, 1e4, 1e4]]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_delta_is_the_row_sum(dtype):
    dout, out = (torch.randn(2, 37, 3, 80, device=DEVICE).to(dtype) for _ in range(2))
    exact = (dout.double() * out.double()).sum(-1).transpose(1, 2)
    for delta in (row_delta(dout, out), triton_attention.row_delta(dout, out)):
        torch.testing.assert_close(delta.double(), exact, rtol=1e-5, atol=1e-4)


def test_kernels_are_interpreted_only_without_a_gpu():
    assert (os.environ.get("TRITON_INTERPRET") == "1") == (DEVICE == "cpu")
