"""The kernels of the loss head against the softmax in fp64."""

from __future__ import annotations

import pytest
import torch
from helpers.errors import assert_as_exact_as
from longring.kernels.triton_loss import BLOCK, gradient_, softmax_sums
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def results(logits: Tensor, targets: Tensor, num_rows: int, softmax: Tensor, onehot: Tensor) -> dict[str, Tensor]:
    """Return what the kernels give, by torch in the dtype of softmax."""
    some = logits[:, :num_rows].to(softmax.dtype)
    largest = some.amax(-1)
    exponentials = (some - largest[:, None]).exp()
    target_logits = some.gather(1, targets[:, None])[:, 0] - largest
    gradient = torch.zeros_like(logits, dtype=softmax.dtype)
    gradient[:, :num_rows] = exponentials * softmax[:, None]
    gradient[torch.arange(len(logits)), targets] -= onehot
    return {"largest": largest, "sums": exponentials.sum(-1), "target_logits": target_logits, "gradient": gradient}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_sums_and_gradient(dtype, scale):
    """Two blocks of columns, of which some are padding, and targets in both."""
    generator = torch.Generator().manual_seed(0)
    width, num_rows = BLOCK + 256, BLOCK + 200
    logits = (scale * torch.randn(3, width, generator=generator)).to(DEVICE, dtype)
    logits[0, num_rows - 2] = 5 * scale  # beyond all logits of the first block
    logits[:, num_rows:] = torch.inf
    targets = torch.tensor([0, BLOCK - 1, num_rows - 1], device=DEVICE)
    softmax, onehot = torch.rand(2, 3, generator=generator).to(DEVICE)
    exact = results(logits.double(), targets, num_rows, softmax.double(), onehot.double())
    plain = results(logits, targets, num_rows, softmax, onehot)
    below = exact.pop("largest")[:, None] - logits.double()
    below[:, num_rows:] = torch.inf
    largest, sums, target_logits = softmax_sums(logits, targets, num_rows)
    assert torch.equal(largest, plain.pop("largest"))
    gradient = gradient_(logits, targets, num_rows, largest, softmax, onehot)
    assert gradient is logits and not gradient[:, num_rows:].any()
    # The exponent is rounded twice in fp32, its power and the product once each; then all is rounded to dtype.
    power = (-below).exp() * softmax.double()[:, None]
    allowed = 2**-24 * (2 * below.nan_to_num(posinf=0) + 4) * power + torch.finfo(dtype).eps * exact["gradient"].abs()
    assert ((gradient.double() - exact.pop("gradient")).abs() <= allowed + 1e-38).all()
    del plain["gradient"]
    assert_as_exact_as({"sums": sums, "target_logits": target_logits}, plain, exact, factor=2)


def test_a_rank_of_padding_alone():
    logits, targets = torch.full((2, 64), torch.nan, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    largest, sums, _ = softmax_sums(logits, targets, 0)
    assert (largest == torch.finfo(torch.float32).min).all() and not sums.any()
    ones = torch.ones(2, device=DEVICE)
    assert not gradient_(logits, targets, 0, largest, ones, 0 * ones).any()
