"""Activations on the host: their memory is free meanwhile, and a layer brings back the one before it."""

from __future__ import annotations

import pytest
import torch
from longring.model.host_copies import HostCopies
from torch.multiprocessing.reductions import StorageWeakRef


@pytest.mark.parametrize("copied", [True, False])
def test_layers_come_back_one_ahead_of_the_backward(copied):
    host, seen = HostCopies(), list[list[int]]()
    weights = [torch.full((8,), 0.5 + at, requires_grad=True) for at in range(4)]
    kept: list[StorageWeakRef] = []
    x = torch.ones(8)
    for at, weight in enumerate(weights):
        with host.of_layer(is_last=at == 3) if copied else torch.enable_grad():
            scaled = weight * x
            kept.append(StorageWeakRef(scaled.untyped_storage()))
            x = scaled.sin()  # keeps `scaled`
            del scaled
        weight.register_hook(lambda _: seen.append([at for at, left in enumerate(host._layers) if left]))
    assert [ref.expired() for ref in kept] == [copied] * 3 + [False]
    x.sum().backward()
    assert seen == ([[0, 1], [0], [], []] if copied else [[]] * 4)
    y, plain = torch.ones(8), [weight.detach().clone().requires_grad_() for weight in weights]
    for weight in plain:
        y = (weight * y).sin()
    y.sum().backward()
    for weight, other in zip(weights, plain, strict=True):
        assert weight.grad is not None and other.grad is not None and torch.equal(weight.grad, other.grad)
