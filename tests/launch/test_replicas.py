"""A replica that has drifted is found, at every ZeRO stage; ranks that hold different slices do not count."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from helpers.faulty import flip_a_bit
from hypothesis import given
from hypothesis import strategies as st
from longring.launch.build import build_engine
from longring.launch.config import load_recipe
from longring.parallel.fragments import held
from longring.parallel.mesh import join
from longring.parallel.replicas import drifted_ranks, sum_of_bits


@given(
    numel=st.integers(1, 40),
    first=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_every_single_bit_counts_and_nothing_beside_the_tensor(numel, first, dtype, data):
    around = torch.randn(60, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor, before = around[first : first + numel], torch.tensor(7)
    plain = sum_of_bits(tensor, before)
    assert plain.dtype == torch.int64
    assert plain.shape == ()
    memory = around.view(torch.uint8)
    byte, bit = data.draw(st.integers(0, memory.numel() - 1)), data.draw(st.integers(0, 7))
    memory[byte] ^= 1 << bit
    inside = first * around.element_size() <= byte < (first + numel) * around.element_size()
    assert (sum_of_bits(tensor, before) != plain) == inside
    memory[byte] ^= 1 << bit
    assert sum_of_bits(tensor, before) == plain
    assert sum_of_bits(tensor, torch.tensor(8)) != plain, "the sums of earlier tensors count"


def drifts(recipe_file: Path, cases: list[tuple[list[str], int, int]]) -> list[list[list[int]]]:
    """Return the ranks that have drifted before and after a bit of rank `flipped`'s `number`-th tensor flips."""
    found = []
    for overrides, flipped, number in cases:
        recipe = load_recipe(recipe_file, overrides)
        mesh = join(recipe.parallel, 1)
        engine = build_engine(recipe, 500, mesh)
        before = drifted_ranks(engine, mesh)
        tensors = [*engine.parameters(), *(f.tensors["exp_avg"] for f in held(engine, mesh))]
        if int(os.environ["RANK"]) == flipped and tensors[number].numel():
            flip_a_bit(tensors[number])
        found.append([before, drifted_ranks(engine, mesh)])
    return found


CASES = {
    "ZeRO 0": (["parallel.zero_stage=0"], 3, 0, [3]),
    "ZeRO 0, the last parameter": (["parallel.zero_stage=0"], 0, 5, [0]),
    "ZeRO 0, a moment": (["parallel.zero_stage=0"], 1, -1, [1]),
    "ZeRO 0 in bf16": (["parallel.zero_stage=0", "train.dtype=bfloat16"], 2, 1, [2]),
    "ZeRO 1 in bf16": (["parallel.zero_stage=1", "train.dtype=bfloat16"], 2, 1, [2]),
    "ZeRO 2": (["parallel.zero_stage=2"], 1, 2, [1]),
    "ZeRO 3 has no replicas": (["parallel.zero_stage=3"], 1, 0, []),
    # Ranks 1 and 3 hold the same slices, and neither is in the majority.
    "tensor parallelism": (["parallel.zero_stage=1", "parallel.tensor=2"], 1, 0, [1, 3]),
}


@pytest.mark.full
def test_the_rank_that_has_drifted_is_named_on_all_ranks(on_ranks, recipe_file):
    results = on_ranks(4, drifts, recipe_file, [case[:3] for case in CASES.values()])
    for rank, found in enumerate(results):
        assert dict(zip(CASES, found, strict=True)) == {name: [[], case[3]] for name, case in CASES.items()}, rank
