"""Recomputation of activations in the backward pass gives equal gradients and sends no more messages."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers.errors import gradient
from helpers.lanes import by_lane
from longring.kernels.layout import SeqLayout
from longring.launch.build import attention_over_ranks
from longring.launch.config import load_recipe
from longring.model.transformer import Transformer
from longring.model.weights import fill_weights
from longring.parallel.cp.grid import CpGrid
from longring.parallel.cp.group import open_group
from longring.parallel.cp.layout import zigzag
from longring.parallel.cp.transports import Distributed
from longring.parallel.mesh import join, megatron_config
from torch import nn

TOKENS = 64


def gradients(recipe_file, recompute: bool, grid: CpGrid) -> tuple[list[torch.Tensor], int, int]:
    """Return this rank's gradients of a loss, number of messages posted and bytes that the graph keeps."""
    recipe = load_recipe(recipe_file)
    mesh = join(recipe.parallel, 1)
    group = open_group(range(dist.get_world_size()), [grid])
    layout = SeqLayout(zigzag(TOKENS, group.rank, group.size).runs, (0, 21))
    attention = attention_over_ranks(recipe, mesh.device, group, {None: grid}, TOKENS)(layout)
    torch.manual_seed(0)
    model = Transformer(recipe.model, 100, megatron_config(recipe.parallel), recompute)
    fill_weights(model, recipe.model, 0, mesh.device, torch.float32)
    tokens = torch.randint(100, (1, TOKENS + 1))
    at = layout.positions()

    posted = 0
    post = Distributed.post

    def counting(self, sends, receives):
        nonlocal posted
        posted += len(sends) + len(receives)
        post(self, sends, receives)

    kept: dict[int, int] = {}
    Distributed.post = counting
    try:
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: (
                (kept.update({x.data_ptr(): x.numel() * x.itemsize}), x)[1] if not isinstance(x, nn.Parameter) else x
            ),
            lambda x: x,
        ):
            losses = model(tokens[:, at], tokens[:, at + 1], layout, attention)
        losses.sum().backward()
    finally:
        Distributed.post = post
    return [gradient(p).clone() for p in model.parameters()], posted, sum(kept.values())


@pytest.mark.parametrize(
    "grid", by_lane([CpGrid.token_ring(2), CpGrid.ring(2), CpGrid.ulysses(2)], quick=[CpGrid.token_ring(2)]), ids=str
)
def test_recomputation_sends_nothing_twice(on_ranks, recipe_file, grid):
    plain = on_ranks(2, gradients, recipe_file, False, grid)
    again = on_ranks(2, gradients, recipe_file, True, grid)
    for (grads, posted, kept), (grads_again, posted_again, kept_again) in zip(plain, again, strict=True):
        assert posted > 0
        assert posted_again == posted
        assert kept_again < 0.7 * kept
        assert all(torch.equal(x, y) for x, y in zip(grads, grads_again, strict=True))
