"""Steps on any division among ranks against plain PyTorch in fp64 on one process.

The reference shares only the initial weights and the rows of each batch with LongRing.
"""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.lanes import by_lane
from helpers.plain_model import plain_losses
from longring.data.prepare.prepare import prepare
from longring.data.read.batch_order import ReplicaShare
from longring.data.read.loader import Loader, MicroBatch
from longring.launch.build import build_engine
from longring.launch.config import Recipe, load_recipe
from longring.launch.grids import decide
from longring.launch.preflight import preflight
from longring.launch.train import train
from longring.parallel.cp.choose_layout import LayoutPricer
from longring.parallel.cp.cost import Speed
from longring.parallel.cp.packed import Runs, divided
from longring.parallel.cp.topology import full_mesh
from longring.parallel.mesh import join
from rich.console import Console
from torch import Tensor

DIVISIONS = {
    "dp4": ["parallel.tokens_per_rank=512"],
    "cp4": ["parallel.tokens_per_rank=128"],
    "tp2-dp2": ["parallel.tokens_per_rank=512", "parallel.tensor=2"],
    "tp2-cp2": ["parallel.tokens_per_rank=256", "parallel.tensor=2"],
    "tp2-cp2-sp": ["parallel.tokens_per_rank=256", "parallel.tensor=2", "parallel.sequence_parallel=true"],
}


STEPS = 12
NUM_ORDERS = 8
"""Number of plain PyTorch runs whose largest error is what rounding does."""
# Rests and short documents are packed: a sequence of the smallest bucket holds several documents.
PACKED = ["data.rest=pack", "data.max_bucket_tokens=128"]
# The first of two layers has an attention window of 40 tokens.
WINDOWED = ["model.window_tokens=40", "model.layer_pattern=['window', 'full']"]

Batch = list[np.ndarray]
"""The documents of one step, int64 arrays; each token but the first is the target of those before it."""


def initial_weights_and_batches(recipe_file: Path, overrides: list[str]) -> tuple[dict[str, Tensor], list[Batch]]:
    recipe = load_recipe(recipe_file, [*overrides, f"train.steps={STEPS}"])
    mesh = join(recipe.parallel, 1)
    planned = preflight(recipe, 1)
    module = build_engine(recipe, planned.manifest.vocab_size, mesh).module
    assert isinstance(module, torch.nn.Module)
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    weights["head.weight"] = weights["head.weight"][: planned.manifest.vocab_size]  # the rest is padding
    order = planned.order
    loader = Loader(
        planned.manifest, order, recipe.loader, lambda length: ReplicaShare(0, 1, order.slot_tokens // length)
    )
    batches: list[Batch] = [[] for _ in range(recipe.train.steps)]
    for batch in loader.batches(0, recipe.train.steps):  # a micro-batch for each slot
        batches[batch.step - 1] += documents(batch)
    return weights, batches


def documents(batch: MicroBatch) -> Batch:
    """Return the documents of a batch; each is trained as if it stood alone, at position 0."""
    if batch.document_starts is None:
        return list(batch.rows.astype(np.int64))
    edges = [(*starts, batch.length) for starts in batch.document_starts]
    return [row[a : b + 1] for row, at in zip(batch.rows.astype(np.int64), edges, strict=True) for a, b in pairwise(at)]


def run_steps(recipe_file: Path, overrides: list[str]) -> None:
    train(load_recipe(recipe_file, [*overrides, f"train.steps={STEPS}"]), Console(quiet=True))


def run_steps_by_price(recipe_file: Path, overrides: list[str]) -> dict[tuple[int, ...], list[Runs]]:
    """Run the steps as if tiles took longer than messages; return the runs of packings that are not in zigzag."""
    by_work, choose = {}, LayoutPricer.choose

    def chosen(pricer: LayoutPricer, starts: tuple[int, ...]) -> list[Runs]:
        runs = choose(pricer, starts)
        if runs != divided("zigzag", pricer.num_tokens, starts, pricer.size):
            by_work[starts] = runs
        return runs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decide, "named_topology", lambda *_: (full_mesh(4), Speed(1e9, 1e9)))
        patch.setattr(LayoutPricer, "choose", chosen)
        run_steps(recipe_file, overrides)
    return by_work


def plain_run(
    weights: dict[str, Tensor], batches: list[Batch], recipe: Recipe, dtype: torch.dtype, compute: torch.dtype
) -> dict[str, np.ndarray]:
    """Train by AdamW (Loshchilov and Hutter, algorithm 2) with clipping and a cosine; return metrics.

    Weights and moments are of `dtype`; forward and backward have a copy of the weights in `compute`.
    """
    t = recipe.train
    w = {name: value.to(dtype, copy=True) for name, value in weights.items()}
    first, second = ({name: torch.zeros_like(v) for name, v in w.items()} for _ in range(2))
    losses, norms = [], []
    for step, batch in enumerate(batches, start=1):
        # Documents of equal length are computed together, for speed.
        by_length = [np.stack([x for x in batch if len(x) == n]) for n in sorted({len(x) for x in batch})]
        copy = {name: value.detach().to(compute).requires_grad_() for name, value in w.items()}
        parts = [plain_losses(copy, torch.from_numpy(rows), recipe.model).flatten() for rows in by_length]
        loss = torch.cat(parts).to(dtype).mean()
        grads = {name: g.to(dtype) for name, g in zip(w, torch.autograd.grad(loss, list(copy.values())), strict=True)}
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        losses.append(loss.item())
        norms.append(norm)
        part = (step - t.warmup_steps) / (t.steps - t.warmup_steps)
        cosine = t.min_learning_rate + (t.learning_rate - t.min_learning_rate) * (1 + math.cos(math.pi * part)) / 2
        rate = t.learning_rate * step / t.warmup_steps if step <= t.warmup_steps else cosine
        with torch.no_grad():
            for name, value in w.items():
                g = grads[name] * min(1.0, t.clip_grad_norm / (norm + 1e-6))
                first[name] = t.beta1 * first[name] + (1 - t.beta1) * g
                second[name] = t.beta2 * second[name] + (1 - t.beta2) * g * g
                moved = (first[name] / (1 - t.beta1**step)) / ((second[name] / (1 - t.beta2**step)).sqrt() + 1e-8)
                decay = t.weight_decay if value.dim() > 1 else 0.0
                value -= rate * (moved + decay * value)
    return {"loss": np.array(losses), "grad_norm": np.array(norms)}


@pytest.fixture(scope="session")
def oracle(recipe_file, on_ranks) -> dict[str, Any]:
    return oracle_of(on_ranks, recipe_file, [])


@pytest.fixture(scope="session")
def packed_recipe_file(recipe_file) -> Path:
    file = recipe_file.with_name("packed.toml")
    file.write_text(recipe_file.read_text().replace(f"{recipe_file.parent}/data", f"{recipe_file.parent}/packed-data"))
    prepare(load_recipe(file, PACKED).data, Console(quiet=True))
    return file


def oracle_of(on_ranks, recipe_file: Path, overrides: list[str]) -> dict[str, Any]:
    [(weights, batches)] = on_ranks(1, initial_weights_and_batches, recipe_file, overrides)
    recipe = load_recipe(recipe_file, [*overrides, f"train.steps={STEPS}"])
    exact = plain_run(weights, batches, recipe, torch.float64, torch.float64)
    # Plain PyTorch of the run's dtype, with each batch's documents in several orders: equal sums, rounded differently.
    # AdamW makes much of rounding in some steps: among 16 orders the largest errors differed by up to six times.
    shuffled, dtype = random.Random(0), getattr(torch, recipe.train.dtype)
    orders = [[shuffled.sample(batch, len(batch)) for batch in batches] for _ in range(NUM_ORDERS)]
    plain = [plain_run(weights, order, recipe, torch.float32, dtype) for order in orders]
    rounding = {name: max(relative(run[name], exact[name]).max() for run in plain) for name in exact}
    # In bf16 the norms of small gradients differ by much, and losses do not.
    most = {"loss": 1e-3, "grad_norm": 1e-3 if dtype == torch.float32 else 0.3}
    assert all(rounding[name] < most[name] for name in most), f"the tolerance is no more than rounding: {rounding}"
    return {"exact": exact, "rounding": rounding, "batches": batches}


def relative(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.abs(got - exact) / np.abs(exact)


# With cp4 and ZeRO 1 each kind of division and each ZeRO stage; the rest of the product is slow.
COVERING = [("dp4", 0), ("tp2-dp2", 2), ("tp2-cp2-sp", 3)]
EVERY = list(product(DIVISIONS, range(4)))


@pytest.mark.parametrize(
    ("division", "zero_stage"),
    by_lane(EVERY, quick=[], slow=[case for case in EVERY if case not in [*COVERING, ("cp4", 1)]]),
)
def test_steps_equal_plain_pytorch(on_ranks, recipe_file, oracle, division, zero_stage, tmp_path):
    on_ranks(
        4,
        run_steps,
        recipe_file,
        [*DIVISIONS[division], f"parallel.zero_stage={zero_stage}", f"run_directory={tmp_path}/run"],
    )
    steps = check(tmp_path / "run", oracle)
    assert {step["bucket"] for step in steps} == {64, 128, 256, 512}
    if division == "cp4":
        assert {step["cp"] for step in steps} >= {1, 4}, "some steps have context parallelism, others none"


# The shares change over the run, and every step has several lengths.
MIXED = ["curriculum.mix=micro_batch", "curriculum.cycles=4", "curriculum.shares.@512=[[0, 0.2], [1, 0.6]]"]


@pytest.fixture(scope="session")
def mixed_oracle(recipe_file, on_ranks) -> dict[str, Any]:
    return oracle_of(on_ranks, recipe_file, MIXED)


@pytest.mark.full
def test_a_second_copy_of_the_weights_changes_no_step(on_ranks, recipe_file, oracle, tmp_path):
    """Pairs of ranks divide it (ZeRO++), however small the weights, and the backward gathers within them."""
    zero = ["parallel.zero_stage=3", "parallel.zero.zero_hpz_partition_size=2"]
    zero += ["parallel.zero.stage3_param_persistence_threshold=1", f"run_directory={tmp_path}/run"]
    on_ranks(4, run_steps, recipe_file, [*DIVISIONS["cp4"], *zero])
    check(tmp_path / "run", oracle)


@pytest.mark.parametrize(
    ("division", "zero_stage"),
    by_lane(
        [("one", 1), ("cp4", 1), ("cp4", 2), ("cp4", 3), ("tp2-cp2", 0), ("tp2-cp2-sp", 3)],
        quick=[],
        slow=[("cp4", 1), ("cp4", 2), ("cp4", 3), ("tp2-cp2", 0)],
    ),
)
def test_steps_of_several_lengths_equal_plain_pytorch(
    on_ranks, recipe_file, mixed_oracle, division, zero_stage, tmp_path
):
    """The gradients of a step are those of its sequences of all lengths together, over rings of 1, 2 and 4 ranks."""
    world, settings = (1, []) if division == "one" else (4, DIVISIONS[division])
    overrides = [*MIXED, *settings, f"parallel.zero_stage={zero_stage}", f"run_directory={tmp_path}/run"]
    on_ranks(world, run_steps, recipe_file, overrides)
    steps = check(tmp_path / "run", mixed_oracle)
    for step, batch in zip(steps, mixed_oracle["batches"], strict=True):
        lengths = [len(row) - 1 for row in batch]
        assert {int(length): part["targets"] for length, part in step["buckets"].items()} == {
            length: length * lengths.count(length) for length in lengths
        }
        total = sum(part["loss"] * part["targets"] for part in step["buckets"].values())
        assert total == pytest.approx(step["loss"] * step["targets"], rel=1e-12)
        assert step["bucket"] == max(lengths)
    assert sum(len(step["buckets"]) > 1 for step in steps) > STEPS / 2, "most steps have several lengths"


@pytest.fixture(scope="session")
def bfloat16_oracle(recipe_file, on_ranks) -> dict[str, Any]:
    return oracle_of(on_ranks, recipe_file, ["train.dtype=bfloat16"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("division", "zero_stage", "on_host"),
    [
        *(("dp4", 1, []), ("cp4", 2, []), ("tp2-cp2-sp", 3, []), ("tp2-cp2", 0, [])),
        *(("cp4", 1, ["offload_optimizer"]), ("tp2-cp2-sp", 3, ["offload_optimizer", "offload_param"])),
    ],
)
def test_steps_in_bfloat16_equal_plain_pytorch(
    on_ranks, recipe_file, bfloat16_oracle, division, zero_stage, on_host, tmp_path
):
    overrides = [*DIVISIONS[division], f"parallel.zero_stage={zero_stage}", "train.dtype=bfloat16"]
    overrides += [f"parallel.zero.{name}=cpu" for name in on_host]
    on_ranks(4, run_steps, recipe_file, [*overrides, f"run_directory={tmp_path}/run"])
    check(tmp_path / "run", bfloat16_oracle)


@pytest.fixture(scope="session")
def packed_oracle(packed_recipe_file, on_ranks) -> dict[str, Any]:
    return oracle_of(on_ranks, packed_recipe_file, PACKED)


ON_RANKS = [(256, "zigzag"), (32, "zigzag"), (32, "balanced"), (32, "documents")]


@pytest.mark.parametrize(("tokens_per_rank", "layout"), by_lane(ON_RANKS, quick=[], slow=ON_RANKS))
def test_packed_documents_are_trained_as_if_alone(
    on_ranks, packed_recipe_file, packed_oracle, tokens_per_rank, layout, tmp_path
):
    """With 256 tokens a rank, sequences are laid end to end on one rank; with 32, 2 and 4 ranks share each."""
    lengths = [len(document) for batch in packed_oracle["batches"] for document in batch]
    assert min(lengths) < 64, "some documents are packed"
    overrides = [*PACKED, f"parallel.tokens_per_rank={tokens_per_rank}", f"parallel.cp.layout={layout}"]
    overrides.append(f"run_directory={tmp_path}/run")
    on_ranks(4, run_steps, packed_recipe_file, overrides)
    check(tmp_path / "run", packed_oracle)


@pytest.fixture(scope="session")
def windowed_oracle(packed_recipe_file, on_ranks) -> dict[str, Any]:
    return oracle_of(on_ranks, packed_recipe_file, [*PACKED, *WINDOWED])


@pytest.mark.parametrize(
    ("schedule", "layout", "zero_stage"),
    by_lane(
        SCHEDULES := [
            ("token_ring", "balanced", 1),
            ("ring", "auto", 3),
            ("ulysses", "documents", 1),
            ("grid", "zigzag", 2),
            ("auto", "auto", 0),
        ],
        quick=[],
        slow=SCHEDULES[1:],
    ),
)
def test_every_schedule_with_windows_and_recomputation(
    on_ranks, packed_recipe_file, windowed_oracle, schedule, layout, zero_stage, tmp_path
):
    """Packed documents over 2 and 4 ranks, one layer with an attention window and one without, and recomputation.

    By price some packings are divided by work, alike on both ranks of a ring.
    """
    overrides = [
        *PACKED,
        *WINDOWED,
        "parallel.tokens_per_rank=32",
        "train.memory.activations=recompute_layer",
        f"parallel.zero_stage={zero_stage}",
        f"parallel.cp.schedule={schedule}",
        f"parallel.cp.layout={layout}",
        "parallel.cp.topology=full_mesh",
        f"run_directory={tmp_path}/run",
    ]
    by_work = on_ranks(4, run_steps_by_price, packed_recipe_file, overrides)
    check(tmp_path / "run", windowed_oracle)
    assert by_work[::2] == by_work[1::2] and all(by_work) == (layout == "auto"), "packings are of 2 ranks"


def check(run: Path, oracle: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare the loss and gradient norm of every step with the reference; return the steps."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    for name, exact in oracle["exact"].items():
        error, rounding = relative(np.array([step[name] for step in steps]), exact), oracle["rounding"][name]
        assert error.max() <= 4 * rounding, f"{name}: {error} against plain PyTorch's {rounding}"
    return steps
