"""The norm of each part of the gradient is that of plain PyTorch, at every ZeRO stage and tensor-parallel degree."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers.errors import relative_rms
from helpers.lanes import by_lane
from helpers.plain_model import plain_losses
from longring.kernels.layout import SeqLayout
from longring.launch.build import attention_on_one_rank, build_engine
from longring.launch.config import Recipe, load_recipe
from longring.parallel.gradient_norms import GradientNorms, part_of
from longring.parallel.mesh import join
from longring.parallel.zero import gradient_norm, set_learning_rate
from torch import Tensor

VOCABULARY, TOKENS = 500, 64
CLIP = 1e-2
"""Largest norm of a step: far below the gradient's, so that DeepSpeed multiplies all gradients."""


def recipe_of(recipe_file: Path, settings: list[str]) -> Recipe:
    tokens = [f"{key}={TOKENS}" for key in ("data.max_bucket_tokens", "parallel.tokens_per_rank")]
    step = [f"train.global_batch_tokens={4 * TOKENS}", f"train.clip_grad_norm={CLIP}", "train.dtype=float32"]
    return load_recipe(recipe_file, [*tokens, *step, *settings])


def rows(number: int) -> Tensor:
    """Return the tokens of one of the four sequences of a step, int64 [1, TOKENS + 1]."""
    return torch.randint(VOCABULARY, (1, TOKENS + 1), generator=torch.Generator().manual_seed(number))


def norms_of_steps(recipe_file: Path, each: list[list[str]]) -> list[list[dict[str, float]]]:
    """Return, for each list of settings, the norms by part of two steps, of which only the second is asked for."""
    found = []
    for settings in each:
        recipe = recipe_of(recipe_file, settings)
        mesh = join(recipe.parallel, 1)
        engine = build_engine(recipe, VOCABULARY, mesh)
        set_learning_rate(engine, 0.0)  # the second step has the gradient of the first
        norms, layout = GradientNorms(engine, mesh, 2), SeqLayout.contiguous(TOKENS)
        attend = attention_on_one_rank("auto", mesh.device, [None])(layout)
        found.append([])
        for step in (1, 2):
            norms.before(step)
            for number in range(mesh.data_rank, 4, mesh.data_size):
                tokens = rows(number)
                losses = engine(tokens[:, :-1], tokens[:, 1:], layout, attend)
                engine.backward(losses.mean())
                engine.step()
            found[-1].append(norms.take(gradient_norm(engine)))
    return found


def plain_gradient(recipe_file: Path, dtype: torch.dtype, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradient of plain PyTorch by part, each flat."""
    recipe = recipe_of(recipe_file, [])
    leaves = {name: weight.to(dtype).requires_grad_() for name, weight in weights.items()}
    batch = torch.cat([rows(number) for number in range(4)])
    plain_losses(leaves, batch, recipe.model, vocab_size=VOCABULARY).mean().backward()
    parts: dict[str, list[Tensor]] = {}
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        parts.setdefault(part_of(name), []).append(leaf.grad.flatten().double())
    return {part: torch.cat(found) for part, found in parts.items()}


def initial_weights(recipe_file: Path) -> dict[str, Tensor]:
    recipe = recipe_of(recipe_file, ["parallel.zero_stage=0"])
    engine = build_engine(recipe, VOCABULARY, join(recipe.parallel, 1))
    return {name: param.detach().clone() for param, name in engine.param_names.items()}


CASES = list(product((1, 2, 4), (1, 2)))
"""Numbers of ranks, and tensor-parallel degrees."""


@pytest.mark.parametrize(
    ("world_size", "tensor"),
    by_lane([case for case in CASES if case[0] >= case[1]], quick=[], slow=[(1, 1), (2, 1), (2, 2)]),
)
def test_norms_by_part_are_those_of_plain_torch(on_ranks, recipe_file, world_size, tensor):
    [weights] = on_ranks(1, initial_weights, recipe_file)
    exact, plain = (plain_gradient(recipe_file, dtype, weights) for dtype in (torch.float64, torch.float32))
    each = [[f"parallel.zero_stage={stage}", f"parallel.tensor={tensor}"] for stage in range(4)]
    each.append(["parallel.zero_stage=2", f"parallel.tensor={tensor}", "parallel.zero.offload_optimizer=cpu"])
    for of_rank in on_ranks(world_size, norms_of_steps, recipe_file, each):
        for settings, (not_asked, norms) in zip(each, of_rank, strict=True):
            assert not_asked == {}
            assert list(norms) == ["embedding", "blocks.0", "blocks.1", "norm", "head"], settings
            assert math.sqrt(sum(norm**2 for norm in norms.values())) > CLIP, "told before clipping"
            for part, gradient in exact.items():
                # A norm errs by no more than the relative error of its gradient.
                error = 2 * relative_rms(plain[part], gradient)
                assert norms[part] == pytest.approx(float(gradient.norm()), rel=error), (settings, part)
