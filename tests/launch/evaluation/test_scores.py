"""Scores of rows over several ranks: plain PyTorch in fp64, real greedy generation, and equality on any division."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.lanes import by_lane
from helpers.plain_model import plain_losses
from longring.data.format.manifest import Manifest, open_prepared
from longring.data.tasks.catalog import samples
from longring.data.tasks.held_out import HeldOut
from longring.data.tasks.material import Material
from longring.launch.build import build_engine, open_layouts
from longring.launch.config import Recipe, load_recipe
from longring.launch.evaluation import context
from longring.launch.evaluation.context import HeldOutRows, gain_of_context, judged, key_tokens, long_ppl
from longring.launch.evaluation.score import Row, Scorer
from longring.launch.evaluation.tasks import score_task
from longring.parallel.mesh import join
from numpy.typing import NDArray
from torch import Tensor

LENGTH, SEQUENCES, SHORT, STRIDE = 512, 3, 128, 32
TASKS = ("needle_multivalue", "automaton", "copy_text", "prefix")


def opened(recipe_file: Path, overrides: list[str]) -> tuple[Recipe, Manifest, Scorer]:
    """Return the scorer of the longest bucket, for a model whose weights are so large that context matters."""
    recipe = load_recipe(recipe_file, ["model.num_kv_heads=4", "model.init_std=0.2", *overrides])
    manifest = open_prepared(recipe.data.directory)
    mesh = join(recipe.parallel, recipe.max_context_parallel, 5)
    engine = build_engine(recipe, manifest.vocab_size, mesh)
    engine.eval()
    [layout] = open_layouts(recipe, mesh, [LENGTH], lambda _: None).values()
    return recipe, manifest, Scorer(engine, mesh, layout, lambda _: None)


def held_out(manifest: Manifest) -> HeldOutRows:
    return HeldOutRows.of(manifest, manifest.buckets("held_out")[-1], SEQUENCES)


def measured(recipe_file: Path, overrides: list[str]) -> dict[str, Any]:
    """Return all measurements, and on one rank the losses and weights as well."""
    _, manifest, scorer = opened(recipe_file, overrides)
    material = Material(manifest.tokenizer().tokenizer, manifest.boundary_id, HeldOut(manifest))
    rows = held_out(manifest)
    # An untrained model is seldom right, but every second of its most likely tokens is even.
    every = np.stack(np.meshgrid(np.arange(LENGTH), np.arange(0, manifest.vocab_size, 2)), -1).reshape(-1, 2)
    parts = (np.arange(LENGTH) % 2).astype(np.uint8)
    sums = scorer.sums(SEQUENCES, 2, lambda number: rows.row(number, parts)._replace(accepted=every))
    return {
        "right tokens of all tokens": sums[..., 1:].tolist(),
        "gain": gain_of_context(scorer, rows),
        "long_ppl": long_ppl(LENGTH, SHORT, None, key_tokens(scorer, rows, SHORT, STRIDE)),
        **{name: score_task(scorer, name, material, count=3, distractors=1, seed=4) for name in TASKS},
    }


def assert_equal(found: Any, expected: Any) -> None:
    """Assert that two trees are equal, numbers but for the rounding of fp32."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            if key != "cp":
                assert_equal(found[key], expected[key])
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    else:
        assert found == expected


@pytest.fixture(scope="module")
def on_one_rank(on_ranks, recipe_file):
    [found] = on_ranks(1, measured, recipe_file, [])
    return found


DIVISIONS = {
    **{
        f"{schedule} of {ranks}": (
            ranks,
            [f"parallel.tokens_per_rank={LENGTH // ranks}", f"parallel.cp.schedule={schedule}"],
        )
        for ranks in (2, 4)
        for schedule in ("ring", "ring_both_ways", "token_ring", "ulysses", "grid")
    },
    **{
        f"{layout} ring of 4": (
            4,
            ["parallel.tokens_per_rank=128", "parallel.cp.schedule=ring", f"parallel.cp.layout={layout}"],
        )
        for layout in ("balanced", "documents")
    },
    "2 replicas of 2": (4, ["parallel.tokens_per_rank=256", "parallel.cp.schedule=token_ring"]),
    "2 replicas": (2, ["parallel.tokens_per_rank=512"]),
    "2 rows at once": (1, ["parallel.tokens_per_rank=1024"]),
    "tensor of 2, ZeRO 3": (4, ["parallel.tensor=2", "parallel.zero_stage=3", "parallel.tokens_per_rank=256"]),
}


@pytest.mark.parametrize(
    "name",
    by_lane(
        DIVISIONS, quick=[], slow=[name for name in DIVISIONS if name not in ("token_ring of 2", "2 rows at once")]
    ),
)
def test_every_division_gives_the_numbers_of_one_rank(on_ranks, recipe_file, on_one_rank, name):
    ranks, overrides = DIVISIONS[name]
    for found in on_ranks(ranks, measured, recipe_file, ["parallel.cp.topology=full_mesh", *overrides]):
        assert_equal(found, on_one_rank)


class Plain:
    """The same weights in plain PyTorch."""

    def __init__(self, recipe: Recipe, manifest: Manifest, scorer: Scorer, dtype: torch.dtype) -> None:
        self._weights = {
            name.removeprefix("module."): weight.detach().to(dtype) for name, weight in scorer.engine.named_parameters()
        }
        self._recipe, self._vocab_size = recipe, manifest.vocab_size

    def losses(self, tokens: NDArray[np.int64]) -> Tensor:
        return plain_losses(
            self._weights, torch.from_numpy(tokens)[None], self._recipe.model, vocab_size=self._vocab_size
        )[0]

    def greedy(self, tokens: list[int]) -> int:
        """Return the most likely next token: the target with the smallest loss."""
        every = torch.arange(self._vocab_size)
        inputs = torch.tensor(tokens).expand(self._vocab_size, -1)
        rows = torch.cat([inputs, every[:, None]], 1)
        return int(plain_losses(self._weights, rows, self._recipe.model, vocab_size=self._vocab_size)[:, -1].argmin())


def against_plain(recipe_file: Path) -> None:
    recipe, manifest, scorer = opened(recipe_file, [])
    plain, rows = Plain(recipe, manifest, scorer, torch.float64), held_out(manifest)
    none = np.zeros(LENGTH, dtype=np.uint8)
    tokens = [rows.row(number, none).tokens for number in range(SEQUENCES)]

    # Any parts, any accepted tokens.
    draw = np.random.default_rng(0)
    parts = [draw.integers(0, 4, LENGTH).astype(np.uint8) for _ in tokens]
    sums = scorer.sums(SEQUENCES, 4, lambda number: Row(tokens[number], parts[number]))
    for one, part, found in zip(tokens, parts, sums, strict=True):
        losses = plain.losses(one).numpy()
        for index in range(4):
            assert found[index, 0] == pytest.approx(losses[part == index].sum(), rel=1e-5)
            assert found[index, 2] == (part == index).sum()
    anything = np.stack(np.meshgrid(np.arange(100, LENGTH), np.arange(manifest.vocab_size)), -1).reshape(-1, 2)
    sums = scorer.sums(1, 4, lambda number: Row(tokens[0], parts[0], accepted=anything))
    assert (sums[0, :, 1] >= [(parts[0][100:] == index).sum() for index in range(4)]).all()

    # A visible prefix is what a shorter row begins with, since rotary angles depend on distances alone.
    found = gain_of_context(scorer, rows)
    begin = LENGTH - LENGTH // 8
    for visible, loss in enumerate(found["losses"]):
        expected = [plain.losses(one[begin - visible * LENGTH // 8 :])[-LENGTH // 8 :].mean() for one in tokens]
        assert loss == pytest.approx(float(np.mean(expected)), rel=1e-4)

    # What the own, another and no prefix are worth: rows whose cut is in the middle, as each holds one document.
    material = Material(manifest.tokenizer().tokenizer, manifest.boundary_id, HeldOut(manifest))
    score = score_task(scorer, "prefix", material, count=2, distractors=1, seed=4)
    own, other, alone = 0.0, 0.0, 0.0
    for sample in samples("prefix", material, LENGTH, count=2, distractors=1, seed=4):
        cut = int(sample.parts[0].argmax())
        own, other = (
            total + float(plain.losses(row)[cut:].mean()) for total, row in zip((own, other), sample.rows, strict=True)
        )
        alone += float(plain.losses(sample.rows[0][cut:]).mean())
    assert score["gain"] == pytest.approx((alone - own) / 2, rel=1e-3)
    assert score["margin"] == pytest.approx((other - own) / 2, rel=1e-3)

    # LongPPL by its formula, token by token.
    key_losses = []
    for one in tokens:
        whole = plain.losses(one).numpy()
        for position in range(SHORT, LENGTH):
            end = position // STRIDE * STRIDE + STRIDE
            short = plain.losses(one[end - SHORT : end + 1]).numpy()[position - end]
            if short - whole[position] > 0.5 and whole[position] < 6:
                key_losses.append(whole[position])
    with pytest.MonkeyPatch.context() as patch:  # an untrained model has no key tokens
        patch.setattr(context, "LONG_SHORT_NATS", 0.5)
        patch.setattr(context, "LONG_NATS", 6)
        chosen = list(key_tokens(scorer, rows, SHORT, STRIDE))
    ppl = long_ppl(LENGTH, SHORT, None, chosen)
    again = long_ppl(LENGTH, SHORT, "judge", judged(scorer, rows, np.stack([key for _, key in chosen])))
    assert again == {**ppl, "judge": "judge"}
    assert ppl["key_tokens"] == len(key_losses) > 10
    assert ppl["long_ppl"] == pytest.approx(math.exp(np.mean(key_losses)), rel=1e-4)


@pytest.mark.full
def test_losses_by_part_gain_and_long_ppl_equal_plain_pytorch(on_ranks, recipe_file):
    on_ranks(1, against_plain, recipe_file)


def generated(recipe_file: Path) -> list[tuple[int, bool, bool]]:
    """Return tokens of an answer, whether greedy generation gives it, and whether all its tokens are right."""
    recipe, manifest, scorer = opened(recipe_file, [])
    plain, rows = Plain(recipe, manifest, scorer, torch.float32), held_out(manifest)
    size, found = 4, []
    parts = np.zeros(LENGTH, dtype=np.uint8)
    parts[20 : 20 + size] = 1
    for number in range(SEQUENCES):
        tokens = rows.row(number, parts).tokens.copy()
        answer: list[int] = []
        for _ in range(size):
            answer.append(plain.greedy([*tokens[:21].tolist(), *answer]))
        for wrong in range(-1, size):
            row = tokens.copy()
            row[21 : 21 + size] = answer
            if wrong >= 0:
                row[21 + wrong] = (answer[wrong] + 1) % manifest.vocab_size
            sums = scorer.sums(1, 2, lambda _, row=row: Row(row, parts))[0, 1]
            found.append((size, row[21 : 21 + size].tolist() == answer, bool(sums[1] == sums[2])))
    return found


@pytest.mark.full
def test_all_tokens_are_right_if_and_only_if_greedy_generation_gives_the_answer(on_ranks, recipe_file):
    [found] = on_ranks(1, generated, recipe_file)
    assert len(found) == SEQUENCES * 5
    assert all(given == right for _, given, right in found)
    assert sum(right for _, _, right in found) == SEQUENCES
