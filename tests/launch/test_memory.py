"""Activations that are kept, computed again, on the host or in tiles: equal gradients, and no message sent twice."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from helpers.errors import gradient, relative_rms
from helpers.lanes import by_lane
from longring.kernels.layout import SeqLayout
from longring.launch.build import attention_on_one_rank, attention_over_ranks, build_engine
from longring.launch.config import load_recipe
from longring.model import host_copies, loss
from longring.model.config import MemoryConfig
from longring.model.transformer import Transformer
from longring.model.weights import fill_weights
from longring.parallel.cp.grid import CpGrid
from longring.parallel.cp.group import open_group
from longring.parallel.cp.layout import zigzag
from longring.parallel.cp.transports import Distributed
from longring.parallel.mesh import join, megatron_config
from torch import nn

TOKENS, VOCABULARY = 64, 500


def gradients(recipe_file, activations: Any, grid: CpGrid) -> tuple[list[torch.Tensor], int, int, int]:
    """Return this rank's gradients of a loss, number of messages posted, and bytes kept by the graph and on the host.

    What a layer leaves on the host is no part of what the graph keeps.
    """
    recipe = load_recipe(recipe_file)
    mesh = join(recipe.parallel, 1)
    group = open_group(range(dist.get_world_size()), [grid])
    layouts = tuple(SeqLayout(zigzag(TOKENS, rank, group.size).runs, (0, 21)) for rank in range(group.size))
    layout, attention = layouts[group.rank], attention_over_ranks(recipe, mesh.device, group, {None: grid})(layouts)
    torch.manual_seed(0)
    memory = MemoryConfig(activations=activations)
    model = Transformer(recipe.model, 100, megatron_config(recipe.parallel), memory)
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
    on_host: list[int] = []
    make = host_copies._HostCopy

    def watched(tensor: torch.Tensor, layer: int, *, stays: bool) -> Any:
        on_host.append(0 if stays else tensor.nbytes)
        return make(tensor, layer, stays=stays)

    Distributed.post = counting
    host_copies._HostCopy = watched  # type: ignore[assignment]
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
        Distributed.post, host_copies._HostCopy = post, make
    return [gradient(p).clone() for p in model.parameters()], posted, sum(kept.values()), sum(on_host)


GRIDS = [CpGrid.token_ring(2), CpGrid.ring(2), CpGrid.ulysses(2)]
LEAST = {"recompute_mlp": 0.85, "recompute_layer": 0.7, "offload": 0.4}
"""Largest share of the bytes of `keep` that the graph keeps at a level."""


@pytest.mark.parametrize(
    ("grid", "activations"), by_lane(product(GRIDS, LEAST), quick=[(GRIDS[0], "offload")]), ids=str
)
def test_nothing_is_sent_twice_and_less_is_kept(on_ranks, recipe_file, grid, activations):
    plain = on_ranks(2, gradients, recipe_file, "keep", grid)
    again = on_ranks(2, gradients, recipe_file, activations, grid)
    for (grads, posted, kept, _), (same_grads, same_posted, less_kept, on_host) in zip(plain, again, strict=True):
        assert posted > 0
        assert same_posted == posted
        assert less_kept < LEAST[activations] * kept
        assert (on_host > 0) == (activations == "offload")
        assert all(torch.equal(x, y) for x, y in zip(grads, same_grads, strict=True))


LEVELS = ("keep", "recompute_mlp", "recompute_layer", "offload")
MEMORY = [
    [f"train.memory.activations={level}", f"train.memory.mlp_tile_tokens={tile}", f"train.memory.kept_logits_gb={kept}"]
    for level, tile, kept in product(LEVELS, (0, 24), (0, 1e-4, 1))
]
"""Every level of activations, SwiGLU whole and in tiles, with none, some and all logits kept."""


def gradients_of_steps(recipe_file, settings: list[str], every: list[list[str]]) -> list[dict[str, torch.Tensor]]:
    """Return the gradients, over ranks and two micro-batches, of the first step with each of some more settings."""
    found = []
    loss.LOGIT_BYTES = 2**13  # 4 tokens: several slices
    for more in every:
        recipe = load_recipe(recipe_file, [*settings, *more])
        mesh = join(recipe.parallel, 1)
        engine = build_engine(recipe, VOCABULARY, mesh)
        layout = SeqLayout.contiguous(TOKENS)
        attend = attention_on_one_rank("auto", mesh.device, [None])(layout)
        for number in range(2):
            generator = torch.Generator().manual_seed(2 * mesh.data_rank + number)
            tokens = torch.randint(VOCABULARY, (1, TOKENS + 1), generator=generator)
            engine.backward(engine(tokens[:, :-1], tokens[:, 1:], layout, attend).mean())
            if number == 0:
                engine.step()
        found.append({name: full_gradient(param) for param, name in engine.param_names.items()})
    return found


def full_gradient(param: nn.Parameter) -> torch.Tensor:
    """Return the gradient of a parameter over all ranks, under any ZeRO stage."""
    found = param.grad if param.grad is not None else safe_get_full_grad(param)
    assert found is not None
    return found.detach().double().clone()


STAGES = {
    "zero0": ["parallel.zero_stage=0"],
    "zero1": ["parallel.zero_stage=1"],
    "zero2": ["parallel.zero_stage=2"],
    "zero3": ["parallel.zero_stage=3"],
    "tensor": ["parallel.zero_stage=1", "parallel.tensor=2", "parallel.sequence_parallel=true"],
}


@pytest.mark.parametrize(
    ("name", "every"),
    by_lane(
        [(name, every) for name in STAGES for every in ("few", "all")],
        quick=[("zero1", "few")],
        slow=[(name, "all") for name in STAGES],
    ),
)
def test_every_combination_has_the_same_gradients(on_ranks, recipe_file, name, every):
    """Activations computed again have the same bits; sums over tiles are rounded otherwise, in fp32."""
    combinations = MEMORY if every == "all" else [MEMORY[0], MEMORY[8], MEMORY[13], MEMORY[-2]]
    for plain, *others in on_ranks(2, gradients_of_steps, recipe_file, STAGES[name], combinations):
        for settings, found in zip(combinations[1:], others, strict=True):
            tiled = "train.memory.mlp_tile_tokens=24" in settings
            for param, expected in plain.items():
                error = relative_rms(found[param], expected)
                assert error <= (2e-6 if tiled else 0), f"{param}: {error:.2g} with {settings}"
