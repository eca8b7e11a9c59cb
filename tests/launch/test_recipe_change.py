"""A change of recipe is accepted exactly where the steps done would have been the same, step by step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.faulty import start
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from longring.data.format.manifest import Manifest, open_prepared
from longring.data.read.batch_order import BatchOrder
from longring.data.read.bucket_order import BucketOrder, Knot, SourcePart
from longring.data.read.shares import WEIGHT_SUM
from longring.launch.checkpoint.format import complete_checkpoints
from longring.launch.config import Recipe, load_recipe
from longring.launch.learning_rate import learning_rate
from longring.launch.preflight import order_of
from longring.launch.recipe_change import FREE, check_change
from longring.launch.records import read_records
from longring.launch.settings import flat, to_tree
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def manifest(recipe_file) -> Manifest:
    return open_prepared(recipe_file.parent / "data")


def replayed(recipe: Recipe, manifest: Manifest, steps: int) -> list[tuple[float, list[tuple[int, list[int]]]]]:
    """Return rate, bucket and sequences of the first steps, each as a training step has them."""
    order = order_of(manifest, recipe)
    return [
        (
            learning_rate(step, recipe.train),
            [(order.lengths[stretch.bucket], order.sequences(stretch).tolist()) for stretch in order.batch(step)],
        )
        for step in range(1, min(steps, recipe.train.steps) + 1)
    ]


SCHEDULES = {
    "train.steps": st.integers(8, 60),
    "train.learning_rate": st.sampled_from([1e-3, 3e-3]),
    "train.min_learning_rate": st.sampled_from([0.0, 1e-3]),
    "train.warmup_steps": st.integers(0, 4),
    "train.decay_steps": st.integers(0, 4),
    "train.decay": st.sampled_from(["cosine", "linear"]),
    "curriculum.odds": st.sampled_from(["uniform", "grow_p2", "grow_p100", [8, 4, 2, 1], [4, 4, 4, 4]]),
    "curriculum.draw": st.sampled_from(["odds_times_left", "odds", "odds_times_batches"]),
    "curriculum.cycles": st.integers(1, 2),
    "curriculum.shares.@64": st.sampled_from([0.2, [[0.6, 0.2], [0.9, 0.5]]]),
    "curriculum.mix": st.sampled_from(["step", "micro_batch"]),
    "loader.window_tokens": st.sampled_from([0, 2048, 2**40]),
}


@st.composite
def changes(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return two schedules that often differ in few keys."""
    before = draw(st.fixed_dictionaries(SCHEDULES))
    changed = draw(st.sets(st.sampled_from(sorted(SCHEDULES)), max_size=2))
    now = draw(st.fixed_dictionaries(SCHEDULES))
    return before, {**before, **{key: now[key] for key in changed}}


BASE = {
    **{"train.steps": 20, "train.learning_rate": 1e-3, "train.min_learning_rate": 1e-3, "train.warmup_steps": 4},
    **{"train.decay_steps": 0, "train.decay": "cosine"},
    **{"curriculum.odds": "grow_p2", "curriculum.draw": "odds", "curriculum.cycles": 4},
    "curriculum.shares.@64": 0.2,
    "curriculum.mix": "step",
    "loader.window_tokens": 0,
}

WSD = {"train.min_learning_rate": 0.0, "train.decay_steps": 16}


@pytest.mark.full
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(both=(BASE, {**BASE, "train.steps": 21}), done=5)  # accepted: constant rates, and draws that do not move
@example(both=(BASE, {**BASE, "train.steps": 8}), done=9)
@example(both=({**BASE, "train.min_learning_rate": 0.0}, {**BASE, "train.steps": 21}), done=4)
@example(both=({**BASE, **WSD}, {**BASE, **WSD, "train.steps": 21}), done=4)  # accepted: before the decay
@example(both=({**BASE, **WSD}, {**BASE, **WSD, "train.steps": 21}), done=5)
@example(both=(BASE, {**BASE, "curriculum.shares.@64": [[0.6, 0.2], [0.9, 0.5]]}), done=8)  # accepted: later shares
@example(both=(BASE, {**BASE, "loader.window_tokens": 2**40}), done=8)  # one shuffle window before and after
@example(both=(BASE, {**BASE, "loader.window_tokens": 2048}), done=8)
@given(both=changes(), done=st.integers(1, 8))
def test_a_schedule_may_change_exactly_where_the_steps_done_stay_the_same(recipe_file, manifest, both, done):
    recipes = [load_recipe(recipe_file, [f"{key}={json.dumps(value)}" for key, value in one.items()]) for one in both]
    then, now = (replayed(recipe, manifest, done) for recipe in recipes)
    first = next((step for step, (a, b) in enumerate(zip(then, now, strict=False), start=1) if a != b), None)
    if first is None and len(now) < len(then):
        first = len(now) + 1
    try:
        check_change(recipes[0], recipes[1], min(done, recipes[0].train.steps), partial(order_of, manifest))
    except ValueError as error:
        said = str(error)
        assert f"and step {first} would" in said
        named = said.partition(": was")[0]
        changed = [key for key in both[0] if both[0][key] != both[1][key]]
        assert any(f"{key} = " in named for key in changed)
        assert all(part.partition(" = ")[0] in changed for part in named.split(", ") if part[:1].isalpha())
    else:
        assert first is None


def test_some_schedules_may_change_and_some_may_not(recipe_file, manifest):
    """The oracle of the test above meets both."""
    cases = [({"train.steps": 21}, 5), ({"train.steps": 40}, 3), ({"train.min_learning_rate": 0.0}, 4)]
    cases.append(({"loader.window_tokens": 2**40}, 8))
    cases.append(({"curriculum.shares.@64": [[0.6, 0.2], [0.9, 0.5]]}, 8))
    before = load_recipe(recipe_file, words(BASE))
    for changed, done in cases:
        check_change(before, load_recipe(recipe_file, words({**BASE, **changed})), done, partial(order_of, manifest))
    # The last 16 steps decay.
    before, longer = (load_recipe(recipe_file, words({**BASE, **WSD, "train.steps": steps})) for steps in (20, 21))
    check_change(before, longer, 4, partial(order_of, manifest))
    with pytest.raises(ValueError, match="was 20 in the 5 steps done, and step 5 would have had learning rate"):
        check_change(before, longer, 5, partial(order_of, manifest))
    before = load_recipe(recipe_file, words(BASE))
    now = load_recipe(recipe_file, words({**BASE, "train.min_learning_rate": 0.0}))
    with pytest.raises(
        ValueError,
        match="train.min_learning_rate = 0.0: was 0.001 in the 5 steps done, and step 5 would have had learning rate",
    ):
        check_change(before, now, 5, partial(order_of, manifest))
    now = load_recipe(recipe_file, words({**BASE, "loader.window_tokens": 2048}))
    with pytest.raises(ValueError, match="loader.window_tokens = 2048: was 0 .* would have had a batch of other"):
        check_change(before, now, 8, partial(order_of, manifest))


def words(tables: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in tables.items()]


OTHER_VALUES = {
    "run_directory": "elsewhere",
    "data.directory": "elsewhere",
    "order.work_directory": "elsewhere",
    "track.tensorboard": False,
    "train.profile": "2-3",
    "train.gradient_norms_every_steps": 5,
    "evaluate.max_tokens_per_bucket": 4096,
    "evaluate.knots": True,
    "faults.spike_deviations": 5.0,
    "faults.hang_minutes": 1.0,
    "parallel.tokens_per_rank": 256,
    "parallel.tensor": 2,
    "parallel.zero_stage": 3,
    "parallel.cp.schedule": "ring",
    "parallel.cp.schedule_of.2": "ring",
    "slurm.time": "1:00:00",
    "slurm.options.qos": "high",
    "loader.workers": 0,
    "loader.prefetch_batches": 2,
    "loader.cache_directory": "/tmp/cache",
    "loader.cache_bytes": 2**30,
    "loader.hash_bytes_per_s": 2**20,
    "train.ranks_per_node": 2,
    "train.checkpoint_every_steps": 7,
    "train.keep_checkpoints": 9,
    "train.keep_checkpoint_every_steps": 2,
    "train.deterministic": True,
    "train.attention_backend": "reference",
    "train.memory.activations": "offload",
    # Not free:
    "data.seed": 1,
    "data.held_out_fraction": 0.2,
    "data.tokenizer.vocab_size": 600,
    "knots.min_document_tokens": 32,
    "knots.chunk_odds": [0, 1],
    "model.num_layers": 3,
    "model.rope_base": 5e4,
    "model.norm_epsilon": 1e-6,
    "init.from": "elsewhere",
    "model.init_std": 0.01,
    "train.global_batch_tokens": 4096,
    "train.weight_decay": 0.2,
    "train.beta1": 0.8,
    "train.beta2": 0.99,
    "train.clip_grad_norm": 0.0,
    "train.dtype": "bfloat16",
    "train.seed": 1,
    "order.by": "random",
    "order.seed": 3,
}


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_what_is_no_schedule_is_free_or_refused(recipe_file, manifest, key):
    before, now = load_recipe(recipe_file), load_recipe(recipe_file, words({key: OTHER_VALUES[key]}))
    if key.startswith(FREE):
        check_change(before, now, 7, partial(order_of, manifest))
        return
    with pytest.raises(ValueError, match=f"^{key} = .*: was .* in the 7 steps done, and step 1 would have been diff"):
        check_change(before, now, 7, partial(order_of, manifest))


def test_the_values_above_are_other_values_and_every_table_has_some(recipe_file):
    known = flat(to_tree(load_recipe(recipe_file)))
    assert all(known.get(key) != value for key, value in OTHER_VALUES.items())
    assert {key.partition(".")[0] for key in known} == {key.partition(".")[0] for key in OTHER_VALUES} | {"curriculum"}


@pytest.mark.full
def test_a_million_steps_are_compared(recipe_file):
    """All steps of two long runs are the same, and each of them is compared."""
    recipe = load_recipe(recipe_file, words({**BASE, "train.steps": 1_000_000}))
    longer = replace(recipe, train=replace(recipe.train, steps=1_000_500))

    def order(key: int) -> BatchOrder:
        part = SourcePart(source="documents", first_sequence=0, shard_sequences=(9,))
        stream = BucketOrder([part], [Knot(0, (WEIGHT_SUM,))], (key,))
        return BatchOrder((64,), [stream], np.zeros((1_000_500, 1), dtype=np.uint8), 2048)

    one, other = order(0), order(1)
    check_change(recipe, longer, 1_000_000, lambda _: one)
    with pytest.raises(ValueError, match="step 1 would have had a batch of other sequences"):
        check_change(recipe, longer, 1_000_000, lambda wanted: one if wanted is recipe else other)


# The topology is named, since two runs that probe may choose different grids.
SMALL = [
    *("train.checkpoint_every_steps=3", "parallel.tokens_per_rank=256", "parallel.cp.topology=full_mesh"),
    *words({**BASE, "train.warmup_steps": 2}),
]


@pytest.mark.full
def test_a_run_whose_steps_are_raised_equals_one_that_had_them_from_the_start(recipe_file, tmp_path, manifest):
    short, long = 8, 11
    recipes = [load_recipe(recipe_file, [*SMALL, f"train.steps={steps}"]) for steps in (short, long)]
    # As far as the longer curriculum draws the same; then the run is extended, and ends a second and a third time.
    orders = [order_of(manifest, recipe) for recipe in recipes]
    same = (orders[0].first_difference(orders[1], short) or short + 1) - 1
    assert same >= 3, "the test has steps to keep"
    raised, whole = tmp_path / "raised", tmp_path / "whole"
    assert trained(recipe_file, whole, [f"train.steps={long}"]) == [0, 0]
    assert trained(recipe_file, raised, [f"train.steps={short}"], stop_after=same) == [0, 0]
    for _ in range(2):
        assert trained(recipe_file, raised, [f"train.steps={long}"]) == [0, 0]
        assert result(raised) == result(whole)
    starts = [json.loads(line) for line in (raised / "starts.jsonl").read_text().splitlines()]
    assert [one["changed"] for one in starts] == [{}, {"train.steps": {"before": short, "now": long}}]
    assert trained(recipe_file, raised, [f"train.steps={long}", "train.seed=1"]) == [2, 2]
    order = order_of(manifest, load_recipe(recipe_file, [*SMALL, "train.steps=40"]))
    refused = orders[1].first_difference(order, long) is not None
    assert trained(recipe_file, raised, ["train.steps=40"]) == ([2, 2] if refused else [0, 0])


@pytest.mark.full
def test_a_run_resumed_inside_a_change_of_shares_equals_one_that_never_stopped(recipe_file, tmp_path):
    """The shares change in every cycle of two steps, and steps have several lengths; the run stops inside a cycle.

    On the same ranks it is equal bit for bit, on twice as many it has the same batches.
    """
    mixed = ["curriculum.mix=micro_batch", "curriculum.slot_tokens=1024", "train.steps=8"]
    mixed.append("curriculum.shares.@512=[[0, 0.2], [1, 0.6]]")
    stopped, whole, wider = tmp_path / "stopped", tmp_path / "whole", tmp_path / "wider"
    assert trained(recipe_file, whole, mixed) == [0, 0]
    assert trained(recipe_file, stopped, mixed, stop_after=3) == [0, 0]
    shutil.copytree(stopped, wider)
    assert trained(recipe_file, stopped, mixed) == [0, 0]
    assert result(stopped) == result(whole)
    assert trained(recipe_file, wider, mixed, ranks=4) == [0] * 4
    steps = [read_records(run / "metrics.jsonl") for run in (wider, whole)]
    lengths = [[{name: of["targets"] for name, of in step["buckets"].items()} for step in one] for one in steps]
    assert lengths[0] == lengths[1]
    assert max(map(len, lengths[0])) == 2, "a step has two slots"
    assert [step["loss"] for step in steps[0]] == pytest.approx([step["loss"] for step in steps[1]], rel=1e-5)
    ledgers = [json.loads((run / "trained.json").read_text()) for run in (stopped, whole, wider)]
    assert ledgers[0] == ledgers[1] == ledgers[2]
    assert sum(cell["tokens"] for cell in ledgers[0]["cells"]) == 8 * 2048


def trained(
    recipe_file: Path, run: Path, overrides: Sequence[str], stop_after: int | None = None, ranks: int = 2
) -> list[int]:
    settings = [*SMALL, *overrides, f"run_directory={run}"]
    return start(ranks, recipe_file, settings, run.with_suffix(".txt"), stop_after=stop_after).wait()


def result(run: Path) -> tuple[list[Any], dict[str, bytes]]:
    """Return the losses, rates and buckets of all steps, and the bytes of every tensor of the last checkpoint."""
    path = complete_checkpoints(run / "checkpoints")[0]
    tensors = {
        f"{file.name}/{key}": tensor.numpy().tobytes()
        for file in path.glob("*.safetensors")
        for key, tensor in load_file(file).items()
    }
    steps = read_records(run / "metrics.jsonl")
    return [[step[key] for key in ("step", "loss", "bucket", "learning_rate")] for step in steps], tensors
