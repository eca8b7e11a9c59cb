"""Collectives of gradients that a backward issues before it is done; the sums do not depend on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.lanes import by_lane
from helpers.nccl_rules import recorded
from longring.kernels.layout import SeqLayout
from longring.launch.build import attention_on_one_rank, build_engine
from longring.launch.config import load_recipe
from longring.parallel.fragments import owned
from longring.parallel.mesh import join
from longring.parallel.zero import set_learning_rate

VOCABULARY, TOKENS = 500, 64
ELEMENTS = 2**14
"""Elements of a bucket: fewer than two matrices of a layer have, so that the small model has several buckets."""


Found = tuple[list[int], list[int], list[torch.Tensor]]


def two_steps(recipe_file: Path, overrides: list[str], elements: int) -> Found:
    """Train two steps of two micro-batches.

    Returns the number of sums over ranks that each backward issues before the first parameter of the model has its
    gradient, the number that it issues in all, and this rank's fp32 weights at the end.
    """
    recipe = load_recipe(recipe_file, [*overrides, f"parallel.zero.reduce_bucket_size={elements}"])
    mesh = join(recipe.parallel, 1)
    engine = build_engine(recipe, VOCABULARY, mesh)
    assert engine.gradient_accumulation_steps() == 2
    set_learning_rate(engine, 1e-3)
    layout = SeqLayout.contiguous(TOKENS)
    attend = attention_on_one_rank("auto", mesh.device, [None])(layout)
    early, in_all = [], []
    with recorded() as calls:

        def sums() -> int:
            return sum("reduce" in call.what for call in calls)

        first = next(iter(engine.param_names))
        first.register_hook(lambda _: early.append(sums() - before))
        for number in range(4):
            generator = torch.Generator().manual_seed(4 * mesh.rank + number)
            tokens = torch.randint(VOCABULARY, (1, TOKENS + 1), generator=generator)
            loss = engine(tokens[:, :-1], tokens[:, 1:], layout, attend).mean()
            before = sums()
            engine.backward(loss)
            in_all.append(sums() - before)
            engine.step()
    return early, in_all, [f.tensors["weight"].clone() for f in owned(engine, mesh)]


OVERLAPPED = {
    "zero1-bf16": ["train.dtype=bfloat16"],
    "zero1-fp32": [],
    "zero1-bf16-sums": ["train.dtype=bfloat16", "train.gradient_dtype=bfloat16"],
    "zero2-bf16": ["train.dtype=bfloat16", "parallel.zero_stage=2"],
    "zero3-bf16": ["train.dtype=bfloat16", "parallel.zero_stage=3"],
}


@pytest.mark.parametrize("name", by_lane(OVERLAPPED, quick=[], slow=list(OVERLAPPED)[1:]))
def test_gradients_are_summed_while_the_backward_computes_others(on_ranks, recipe_file, name):
    [(early, in_all, _), _] = on_ranks(2, two_steps, recipe_file, OVERLAPPED[name], ELEMENTS)
    first, last, *_ = early
    assert last >= 3, "several buckets are on their way before the last gradient"
    # ZeRO 1 sums once a step; ZeRO 2 and 3 keep no more than their part of a sum, so they sum after each micro-batch.
    assert (first == 0) == (in_all[0] == 0) == name.startswith("zero1")
    assert in_all[1] > last


@pytest.mark.full
def test_sums_in_buckets_are_those_of_the_whole(on_ranks, recipe_file):
    """Two numbers have one sum, so not a bit may differ."""
    cut, whole = (on_ranks(2, two_steps, recipe_file, ["train.dtype=bfloat16"], n) for n in (ELEMENTS, 2**30))
    for (_, of_cut, a), (_, of_whole, b) in zip(cut, whole, strict=True):
        assert of_whole[1] == 2, "one for each group of parameters"
        assert of_cut[1] >= 6
        assert of_cut[2:] == of_cut[:2], "each step sums anew"
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
