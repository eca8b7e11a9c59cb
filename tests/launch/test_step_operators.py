"""Operators of a step on one rank: none of them makes or copies more than a step needs."""

from __future__ import annotations

import torch
from helpers.dispatch import Largest, Operators
from longring.kernels.layout import SeqLayout
from longring.launch.build import attention_on_one_rank, build_engine
from longring.launch.config import load_recipe
from longring.model.fused import TORCH
from longring.parallel.mesh import join
from longring.parallel.zero import set_learning_rate

VOCABULARY, TOKENS = 500, 64


def step_of_one_rank(recipe_file) -> tuple[int, int, list[str]]:
    """Return the elements of the largest tensor that a step makes, those of all parameters, and its operators."""
    tokens = [f"{key}={TOKENS}" for key in ("data.max_bucket_tokens", "parallel.tokens_per_rank")]
    tokens += [f"train.global_batch_tokens={TOKENS}", "parallel.zero_stage=0", "train.dtype=float32"]
    recipe = load_recipe(recipe_file, tokens)
    mesh = join(recipe.parallel, 1)
    engine = build_engine(recipe, VOCABULARY, mesh)
    set_learning_rate(engine, 1e-3)
    layout, rows = SeqLayout.contiguous(TOKENS), torch.randint(VOCABULARY, (1, TOKENS + 1))
    attend = attention_on_one_rank("auto", mesh.device, [None])(layout)
    with Largest() as largest, Operators() as operators:
        engine.backward(engine(rows[:, :-1], rows[:, 1:], layout, attend).mean())
        engine.step()
    return largest.elements, sum(p.numel() for p in engine.param_names), operators.calls


def test_a_step_of_one_rank_copies_no_gradients_and_steps_them_at_once(on_ranks, recipe_file):
    [(largest, parameters, operators)] = on_ranks(1, step_of_one_rank, recipe_file)
    assert largest < parameters, "gradients were joined for a sum over one rank"
    assert operators.count("_fused_adamw_") == 2, "once for the weights that decay and once for the others"
    assert not {"slice_backward", "select_backward"} & set(operators), "q, k and v are one split"


def test_swiglu_keeps_its_input_alone():
    kept: list[torch.Tensor] = []
    x = torch.randn(3, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        TORCH.swiglu(x)
    assert [saved.data_ptr() for saved in kept] == [x.data_ptr()]
