"""Gradients of bf16 training are as exact after hundreds of micro-batches as after one, at every ZeRO stage."""

from __future__ import annotations

import io
import math
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from helpers.errors import assert_as_exact_as, relative_rms
from helpers.lanes import by_lane
from helpers.plain_model import plain_losses
from longring.kernels.layout import SeqLayout
from longring.launch.build import attention_on_one_rank, build_engine
from longring.launch.config import Recipe, load_recipe
from longring.parallel.fragments import owned, updates
from longring.parallel.mesh import join
from longring.parallel.zero import gradient_norm, set_learning_rate
from torch import Tensor

VOCABULARY, TOKENS = 500, 64
DIFFERENT = 2
"""Micro-batches of a rank that differ; they are repeated, so that the sum grows as it does early in training."""
Gradient = dict[str, Tensor]


def rows(rank: int, number: int) -> Tensor:
    """Return the tokens of a rank's micro-batch, int64 [1, TOKENS + 1]."""
    seed = DIFFERENT * rank + number % DIFFERENT
    return torch.randint(VOCABULARY, (1, TOKENS + 1), generator=torch.Generator().manual_seed(seed))


def recipe_of(recipe_file: Path, world_size: int, accumulations: int, overrides: list[str]) -> Recipe:
    return load_recipe(
        recipe_file,
        [
            "train.dtype=bfloat16",
            "train.clip_grad_norm=0",
            f"data.max_bucket_tokens={TOKENS}",
            f"parallel.tokens_per_rank={TOKENS}",
            f"train.global_batch_tokens={TOKENS * world_size * accumulations}",
            "model.num_layers=1",
            *overrides,
        ],
    )


def weights_and_gradients(
    recipe_file: Path, accumulations: int, each: list[list[str]]
) -> list[tuple[Gradient, list[tuple[str, int, Tensor]], float]]:
    """Return, for each list of overrides, the weights, this rank's ranges of a step's gradient, and the norm."""
    found = []
    for overrides in each:
        world_size = int(torch.distributed.get_world_size())
        tensor = next((int(word.split("=")[1]) for word in overrides if word.startswith("parallel.tensor=")), 1)
        recipe = recipe_of(recipe_file, world_size // tensor, accumulations, overrides)
        mesh = join(recipe.parallel, 1)
        with redirect_stdout(io.StringIO()) as said:
            engine = build_engine(recipe, VOCABULARY, mesh)
        assert not said.getvalue(), "DeepSpeed prints over the table of steps"
        weights = {name: p.detach().clone() for p, name in engine.param_names.items()}
        layout = SeqLayout.contiguous(TOKENS)
        attend = attention_on_one_rank("auto", mesh.device, [None])(layout)
        for number in range(accumulations):
            tokens = rows(mesh.data_rank, number)
            losses = engine(tokens[:, :-1], tokens[:, 1:], layout, attend)
            engine.backward(losses.mean())
            engine.step()
        # After one step AdamW's first moment is (1 - beta1) times the gradient.
        moments = [(f.parameter.name, f.start, f.tensors["exp_avg"].clone()) for f in owned(engine, mesh)]
        ranges = [(name, start, moment / (1 - recipe.train.beta1)) for name, start, moment in moments]
        found.append((weights, ranges, gradient_norm(engine)))
    return found


def plain_gradient(weights: Gradient, recipe: Recipe, batches: list[Tensor], dtype: torch.dtype) -> Gradient:
    """Return the mean gradient of plain PyTorch in `dtype`, summed over the batches in fp64."""
    leaves = {name: weight.to(dtype).requires_grad_() for name, weight in weights.items()}
    total = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
    for batch in batches:
        loss = plain_losses(leaves, batch, recipe.model, vocab_size=VOCABULARY).mean()
        for name, grad in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            total[name] += grad.double() / len(batches)
    return total


def norm_of(gradient: Gradient) -> float:
    return math.sqrt(sum(float(grad.double().square().sum()) for grad in gradient.values()))


def measure(
    on_ranks, recipe_file: Path, world_size: int, accumulations: int, each: list[list[str]]
) -> tuple[list[Gradient], Gradient, Gradient]:
    """Return the gradient under each list of overrides, that of plain PyTorch in bf16, and that in fp64."""
    ranks = on_ranks(world_size, weights_and_gradients, recipe_file, accumulations, each)
    recipe = recipe_of(recipe_file, world_size, accumulations, [])
    weights, *_ = ranks[0][0]  # under ZeRO 3 no rank holds them, so `each` begins with another stage
    batches = [rows(rank, number) for rank in range(world_size) for number in range(min(DIFFERENT, accumulations))]
    exact = plain_gradient(weights, recipe, batches, torch.float64)
    plain = plain_gradient(weights, recipe, batches, torch.bfloat16)
    gradients = []
    for number in range(len(each)):
        gradient = {name: torch.full((weight.numel(),), math.nan) for name, weight in weights.items()}
        for rank in ranks:
            _, ranges, norm = rank[number]
            assert norm == pytest.approx(norm_of(exact), rel=2 * abs(norm_of(plain) / norm_of(exact) - 1) + 1e-3)
            for name, start, values in ranges:
                gradient[name][start : start + len(values)] = values
        gradients.append({name: values.view_as(weights[name]) for name, values in gradient.items()})
    return gradients, plain, exact


OFFLOADED = [
    *([f"parallel.zero_stage={stage}", "parallel.zero.offload_optimizer=cpu"] for stage in (1, 2, 3)),
    ["parallel.zero_stage=3", "parallel.zero.offload_optimizer=cpu", "parallel.zero.offload_param=cpu"],
]


@pytest.mark.full
def test_gradients_are_as_exact_with_the_optimizer_or_the_weights_on_the_host(on_ranks, recipe_file):
    """On a CPU the host's memory is the same, and the code of DeepSpeed another."""
    gradients, plain, exact = measure(on_ranks, recipe_file, 2, 32, OFFLOADED)
    for settings, gradient in zip(OFFLOADED, gradients, strict=True):
        assert_as_exact_as(gradient, plain, exact, 1.5, str(settings))


SLOW = [(world_size, n, (0, 1, 2, 3)) for world_size, n in ((1, 1), (1, 256), (2, 256), (3, 16), (4, 1), (4, 256))]


@pytest.mark.parametrize(
    ("world_size", "accumulations", "stages"),
    by_lane(
        [
            (1, 32, (1,)),
            (2, 32, (0, 1, 2, 3)),
            *SLOW,
        ],
        quick=[(1, 32, (1,))],
        slow=SLOW,
    ),
)
def test_gradients_are_as_exact_as_those_of_one_micro_batch(on_ranks, recipe_file, world_size, accumulations, stages):
    each = [[f"parallel.zero_stage={stage}"] for stage in stages]
    gradients, plain, exact = measure(on_ranks, recipe_file, world_size, accumulations, each)
    for stage, gradient in zip(stages, gradients, strict=True):
        assert_as_exact_as(gradient, plain, exact, 1.5, f"ZeRO {stage}")


@pytest.mark.full
def test_bfloat16_sums_lose_what_the_documents_say(on_ranks, recipe_file):
    """The setting for less: at every stage a sum in bf16 errs by several times as much."""
    each = [[f"parallel.zero_stage={stage}", "train.gradient_dtype=bfloat16"] for stage in range(4)]
    ranks = on_ranks(1, weights_and_gradients, recipe_file, 64, [["parallel.zero_stage=1"], *each])
    (_, right, _), *others = ranks[0]
    for _, ranges, _ in others:
        flat, reference = (
            torch.cat([values for *_, values in sorted(r, key=lambda x: x[:2])]) for r in (ranges, right)
        )
        assert relative_rms(flat, reference) > 0.01


@pytest.mark.parametrize("stage", by_lane(range(4), quick=[], slow=[1, 2, 3]))
def test_the_norm_counts_what_every_tensor_parallel_rank_holds(on_ranks, recipe_file, stage):
    """DeepSpeed's own optimizer for ZeRO 0 in bf16 sums the norm over the first rank's slices alone."""
    words = [f"parallel.zero_stage={stage}"]
    [[(*_, whole)]] = on_ranks(1, weights_and_gradients, recipe_file, 1, [words])
    split = on_ranks(2, weights_and_gradients, recipe_file, 1, [[*words, "parallel.tensor=2"]])
    assert [norm for [(*_, norm)] in split] == pytest.approx([whole] * 2, rel=0.01)


def steps_without_finite_gradients(recipe_file: Path) -> list[tuple[bool, int, bool, int]]:
    """Return, for each ZeRO stage, what a step without finite gradients does and what the next one does."""
    found = []
    for stage in range(4):
        recipe = recipe_of(recipe_file, 2, 1, [f"parallel.zero_stage={stage}"])
        mesh = join(recipe.parallel, 1)
        engine = build_engine(recipe, VOCABULARY, mesh)
        set_learning_rate(engine, 1e-2)
        layout, tokens = SeqLayout.contiguous(TOKENS), rows(mesh.data_rank, 0)
        attend = attention_on_one_rank("auto", mesh.device, [None])(layout)

        def weights(engine=engine, mesh=mesh) -> list[Tensor]:
            return [f.tensors["weight"].clone() for f in owned(engine, mesh)]

        before = weights()
        for factor in (math.inf if mesh.rank == 1 else 1.0, 1.0):
            engine.backward(engine(tokens[:, :-1], tokens[:, 1:], layout, attend).mean() * factor)
            engine.step()
            same = all(torch.equal(x, y) for x, y in zip(weights(), before, strict=True))
            found.append((math.isfinite(gradient_norm(engine)), updates(engine), same, stage))
    return found


@pytest.mark.full
def test_a_step_without_finite_gradients_changes_nothing_on_any_rank(on_ranks, recipe_file):
    expected = [step for stage in range(4) for step in ((False, 0, True, stage), (True, 1, False, stage))]
    assert on_ranks(2, steps_without_finite_gradients, recipe_file) == [expected] * 2
