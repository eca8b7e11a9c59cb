"""SwiGLU in tiles of tokens: as exact as the whole in bf16, with the activations of one tile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.dispatch import Largest, Operators
from helpers.errors import assert_as_exact_as
from longring.kernels.layout import SeqLayout
from longring.launch.build import attention_on_one_rank
from longring.model.config import MemoryConfig, ModelConfig
from longring.model.mlp import SwiGLU
from longring.model.transformer import TransformerLayer
from longring.model.weights import fill_weights
from longring.parallel.config import ParallelConfig
from longring.parallel.mesh import join, megatron_config
from torch import Tensor

CONFIG = ModelConfig(num_layers=1, hidden_size=48, num_heads=2, num_kv_heads=1, ffn_hidden_size=80, init_std=0.2)
TOKENS, TILE = 520, 17  # the last tile is shorter


def passes(module: Any, x: Tensor, dy: Tensor) -> tuple[dict[str, Tensor], int]:
    """Return result and gradients, and the elements of the largest tensor that either pass makes."""
    with Largest() as largest:
        y = module(x)
        grads = torch.autograd.grad(y, (x, module.gate_up.weight, module.down.weight), dy)
    return dict(zip(("y", "dx", "dgate_up", "ddown"), (y.detach(), *grads), strict=True)), largest.elements


def of_tiles() -> list[tuple[dict[str, Tensor], int]]:
    """Return both passes in bf16 whole, in tiles, and by definition in fp64."""
    parallel = ParallelConfig(tokens_per_rank=64)
    join(parallel, 1)
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, TOKENS, 1, CONFIG.hidden_size, generator=generator).bfloat16()
    found = []
    for tile_tokens in (0, TILE):
        module = SwiGLU(CONFIG, megatron_config(parallel), tile_tokens)
        fill_weights(module, CONFIG, 0, torch.device("cpu"), torch.bfloat16)
        found.append(passes(module, x.clone().requires_grad_(), dy))
        weights = [weight.detach().double().requires_grad_() for weight in module.parameters()]
    exact = x.double().requires_grad_()
    gate, up = (exact @ weights[0].t()).chunk(2, -1)
    y = (F.silu(gate) * up) @ weights[1].t()
    grads = torch.autograd.grad(y, (exact, *weights), dy.double())
    return [*found, (dict(zip(("y", "dx", "dgate_up", "ddown"), (y.detach(), *grads), strict=True)), 0)]


def test_tiles_are_as_exact_as_the_whole(on_ranks):
    [((whole, most), (tiled, most_tiled), (exact, _))] = on_ranks(1, of_tiles)
    assert_as_exact_as(tiled, whole, exact, factor=1.1)
    assert most == TOKENS * 2 * CONFIG.ffn_hidden_size
    assert most_tiled == TOKENS * CONFIG.hidden_size, "its input and its result are whole"


def products_of_a_layer(activations: Any, tile_tokens: int) -> int:
    """Return the number of products of matrices in both passes of a layer."""
    parallel = ParallelConfig(tokens_per_rank=64)
    join(parallel, 1)
    memory = MemoryConfig(activations=activations, mlp_tile_tokens=tile_tokens)
    layer = TransformerLayer(CONFIG, megatron_config(parallel), 0, memory)
    fill_weights(layer, CONFIG, 0, torch.device("cpu"), torch.float32)
    attend = attention_on_one_rank("reference", torch.device("cpu"), [None])(SeqLayout.contiguous(64))
    x = torch.randn(64, 1, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with Operators() as counted:
        layer(x, None, attend).sum().backward()
    return counted.number("mm")


@pytest.mark.full
@pytest.mark.parametrize(("activations", "again"), [("recompute_mlp", 0), ("recompute_layer", 2)])
def test_a_recomputed_layer_leaves_out_products_that_its_backward_does_not_need(on_ranks, activations, again):
    """Recomputation adds the projections of attention, and SwiGLU's input to its backward where that keeps it.

    In tiles, the backward computes this one by itself. Nothing needs SwiGLU's result.
    """
    for tile, more in ((16, 0), (0, 1)):
        [plain] = on_ranks(1, products_of_a_layer, "keep", tile)
        assert on_ranks(1, products_of_a_layer, activations, tile) == [plain + again + more]
