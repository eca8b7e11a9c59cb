"""Predicted memory of a rank, beside the bytes of all tensors that live on it in a step over gloo."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import pytest
from helpers.lanes import by_lane
from longring.launch.config import load_recipe

BENCHMARKS = str(Path(__file__).parents[3] / "benchmarks")
TOKENS, VOCABULARY = 512, 2000
WITHIN = 0.1
"""Largest error of a prediction."""

SMALL = [
    f"parallel.tokens_per_rank={TOKENS}",
    f"train.global_batch_tokens={4 * TOKENS}",
    "data.max_bucket_tokens=1024",
    "model.hidden_size=256",
    "model.ffn_hidden_size=768",
    "model.num_layers=4",
]
"""Weights, moments and activations that all count."""
BUCKET = "parallel.zero.reduce_bucket_size=300000"
LEVELS = ("keep", "recompute_mlp", "recompute_layer", "offload")
ZERO = {
    "zero0": ["parallel.zero_stage=0"],
    "zero1": ["parallel.zero_stage=1", BUCKET],
    "zero2": ["parallel.zero_stage=2", BUCKET],
    "zero3": ["parallel.zero_stage=3", BUCKET],
    "weights held twice": ["parallel.zero_stage=3", BUCKET, "parallel.zero.zero_hpz_partition_size=2"],
    "optimizer on the host, 1": ["parallel.zero_stage=1", BUCKET, "parallel.zero.offload_optimizer=cpu"],
    "optimizer on the host, 2": ["parallel.zero_stage=2", BUCKET, "parallel.zero.offload_optimizer=cpu"],
    "all on the host": [
        *("parallel.zero_stage=3", BUCKET, "parallel.zero.offload_optimizer=cpu", "parallel.zero.offload_param=cpu"),
    ],
}
DIVIDED = {
    "whole": ([], TOKENS),
    "short": ([], TOKENS // 4),
    "ring": (["parallel.cp.schedule=ring"], 2 * TOKENS),
    "token_ring": (["parallel.cp.schedule=token_ring"], 2 * TOKENS),
    "ulysses": (["parallel.cp.schedule=ulysses"], 2 * TOKENS),
    "tensor": (["parallel.tensor=2", "data.max_bucket_tokens=512"], TOKENS),
    "sequence": (["parallel.tensor=2", "parallel.sequence_parallel=true", "data.max_bucket_tokens=512"], TOKENS),
}
DTYPES = {
    "bfloat16": ["train.dtype=bfloat16"],
    "bfloat16 sums": ["train.dtype=bfloat16", "train.gradient_dtype=bfloat16"],
    "float32": ["train.dtype=float32"],
}
LOSSES = {
    "logits kept": [],
    "logits computed again": ["train.memory.kept_logits_gb=0"],
    "tiles": ["train.memory.mlp_tile_tokens=128"],
}


def ratios(recipe_file, cases: list[tuple[list[str], int]]) -> list[tuple[float, str]]:
    """Return, for each list of settings and length of a bucket, predicted over measured bytes, and both."""
    sys.path.append(BENCHMARKS)
    from lib.live_memory import compare

    found = []
    for settings, length in cases:
        compared = compare(load_recipe(recipe_file, [*SMALL, *settings]), length, VOCABULARY)
        parts = {part: f"{count / 1e6:.1f}" for part, count in compared.measured.items()}
        found.append((compared.ratio, f"measured {parts}, predicted {compared.expected}"))
    return found


def check(on_ranks, recipe_file, cases: list[tuple[list[str], int]]) -> None:
    """Assert that each rank's prediction is within WITHIN of what is measured there."""
    for of_rank in on_ranks(2, ratios, recipe_file, cases):
        for (settings, length), (ratio, said) in zip(cases, of_rank, strict=True):
            assert 1 - WITHIN < ratio < 1 + WITHIN, f"{ratio:.3f} of a bucket of {length} with {settings}: {said}"


QUICK = ("zero1", "bfloat16")
SLOW = [case for case in product(ZERO, DTYPES) if case != QUICK]


@pytest.mark.parametrize(("zero", "dtype"), by_lane([QUICK, *SLOW], quick=[QUICK], slow=SLOW))
def test_prediction_of_every_zero_stage(on_ranks, recipe_file, zero, dtype):
    # One level for each dtype; `test_prediction_of_every_level_on_every_division` has every level in both dtypes.
    level = {"bfloat16": "keep", "bfloat16 sums": "recompute_layer", "float32": "recompute_mlp"}[dtype]
    check(on_ranks, recipe_file, [([*ZERO[zero], *DTYPES[dtype], f"train.memory.activations={level}"], TOKENS)])


@pytest.mark.slow
@pytest.mark.parametrize("division", DIVIDED)
def test_prediction_of_every_level_on_every_division(on_ranks, recipe_file, division):
    settings, length = DIVIDED[division]
    turns = list(zip(LEVELS * 2, ["bfloat16"] * 4 + ["float32"] * 4, list(LOSSES) * 3, strict=False))
    cases = [
        ([*settings, *LOSSES[loss], *ZERO["zero1"], *DTYPES[dtype], f"train.memory.activations={level}"], length)
        for level, dtype, loss in turns
    ]
    check(on_ranks, recipe_file, cases)
