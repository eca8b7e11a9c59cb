"""A run on ordered data with knots (prepare, order, train, evaluate) against plain PyTorch in fp64."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.lanes import by_lane
from helpers.plain_model import plain_losses
from helpers.small_checkpoint import read_whole
from longring.data.format.manifest import open_prepared
from longring.data.order.stages import order
from longring.data.prepare.prepare import prepare
from longring.data.read.batch_order import ReplicaShare
from longring.data.read.knots import Knots
from longring.data.read.loader import Loader, read_rows
from longring.launch import cli
from longring.launch.build import BucketLayout, bucket_layouts, build_engine
from longring.launch.config import load_recipe
from longring.launch.evaluate import evaluate
from longring.launch.grids.decide import decide_grids
from longring.launch.preflight import preflight
from longring.launch.train import train
from longring.parallel.mesh import join
from rich.console import Console

SETTINGS = [
    "data.rest=pack",
    "data.tokenizer.knot_chunks=3",
    "data.held_out_fraction=0.2",
    "order.mode=in_context",
    "order.neighbors=5",
    "order.duplicate_overlap=0.95",
    "knots.share=0.7",
    "knots.min_sequence_tokens=64",
    "knots.min_document_tokens=20",
    "train.steps=5",
    "train.warmup_steps=1",
]
DIVISIONS = {
    "dp4": ["parallel.tokens_per_rank=512"],
    "cp4": ["parallel.tokens_per_rank=128"],
    "tp2-cp2": ["parallel.tokens_per_rank=256", "parallel.tensor=2"],
    "dp1": ["parallel.tokens_per_rank=1024"],
}


@pytest.fixture(scope="session")
def ordered(recipe_file) -> tuple[Path, list[str]]:
    """The recipe, and the overrides of a run on its ordered data."""
    folder = recipe_file.parent
    overrides = [*SETTINGS, f"data.directory={folder}/whole", f"order.directory={folder}/ordered"]
    recipe = load_recipe(recipe_file, overrides)
    prepare(recipe.data, Console(quiet=True))
    order(recipe.data, recipe.order, Console(quiet=True), workers=1)
    return recipe_file, overrides


def layout_of(recipe, mesh, length: int) -> BucketLayout:
    """Return the layout of one bucket. Collective."""
    return bucket_layouts(recipe, mesh, [length], decide_grids(recipe, mesh, [length]))[length]


def run(recipe_file: Path, overrides: list[str]) -> None:
    recipe = load_recipe(recipe_file, overrides)
    train(recipe, Console(quiet=True))
    evaluate(recipe, Console(quiet=True))


def first_step(recipe_file: Path, overrides: list[str]) -> tuple[dict, np.ndarray, np.ndarray]:
    """Return the initial weights, and the rows and trained targets of the first batch."""
    recipe = load_recipe(recipe_file, overrides)
    mesh = join(recipe.parallel, 1)
    planned = preflight(recipe, 1)
    module = build_engine(recipe, planned.manifest.vocab_size, mesh).module
    assert isinstance(module, torch.nn.Module)
    weights = {name: p.detach().double() for name, p in module.named_parameters()}
    weights["head.weight"] = weights["head.weight"][: planned.manifest.vocab_size]  # the rest is padding
    knots = Knots(recipe.knots, planned.manifest.tokenizer(), recipe.train.seed)
    loader = Loader(
        planned.manifest, planned.order, recipe.loader, lambda length: ReplicaShare(0, 1, 2048 // length), knots=knots
    )
    [batch] = loader.batches(0, 1)
    assert batch.document_starts is None
    assert batch.trained is not None
    return weights, batch.rows.astype(np.int64), batch.trained


@pytest.mark.parametrize("division", by_lane(DIVISIONS, quick=[], slow=["dp4", "tp2-cp2"]))
def test_the_loss_is_the_mean_of_trained_targets_on_any_division(on_ranks, ordered, division, tmp_path):
    recipe_file, overrides = ordered
    [(weights, rows, trained)] = on_ranks(1, first_step, recipe_file, overrides)
    recipe = load_recipe(recipe_file, overrides)
    assert 0.3 < trained.mean() < 0.98
    w = {name: value.requires_grad_() for name, value in weights.items()}
    losses = plain_losses(w, torch.from_numpy(rows), recipe.model)
    loss = (losses * torch.from_numpy(trained)).sum() / trained.sum()
    norm = math.sqrt(sum(float(g.square().sum()) for g in torch.autograd.grad(loss, list(w.values()))))

    ranks = 1 if division == "dp1" else 4
    overrides = [*overrides, *DIVISIONS[division], f"run_directory={tmp_path}/run", "evaluate.knots=true"]
    on_ranks(ranks, run, recipe_file, overrides)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps[0]["targets"] == trained.sum()
    assert steps[0]["tokens"] == 2048
    assert steps[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert steps[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert all(0 < step["targets"] < 2048 for step in steps)
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())

    # The same held-out sequences, with the same knots, on the weights of the run.
    saved = read_whole(tmp_path / "run/checkpoints/step-00000005")
    weights = {name: torch.from_numpy(saved[f"{name}/weight"]).double() for name in weights}
    manifest = open_prepared(recipe.training_directory)
    knots = Knots(recipe.knots, manifest.tokenizer(), recipe.train.seed)
    [bucket] = manifest.buckets("held_out")
    rows, masks = manifest.reader(bucket).read(range(bucket.sequences)), []
    for number in range(bucket.sequences):
        tied = knots.tie(rows[number], number)
        rows[number], mask = tied or (rows[number], np.ones(bucket.length, dtype=np.bool_))
        masks.append(mask)
    whole_rows = torch.from_numpy(rows.astype(np.int64))
    losses = plain_losses(weights, whole_rows, recipe.model, vocab_size=manifest.vocab_size).numpy()
    mask = np.array(masks)
    assert result["tokens"] == mask.sum() < mask.size
    assert result["loss"] == pytest.approx(losses[mask].mean(), rel=1e-5)
    for part in result["buckets"][0]["by_position"]:
        here = (slice(None), slice(part["from"], part["to"]))
        assert part["tokens"] == mask[here].sum()
        assert part["loss"] == pytest.approx(losses[here][mask[here]].mean(), rel=1e-5)


def masked_and_reset(recipe_file: Path, overrides: list[str]) -> tuple[np.ndarray, np.ndarray, int]:
    """Return losses of packed rows under document masks, of each document alone, and the most documents in a row."""
    recipe = load_recipe(recipe_file, overrides)
    mesh = join(recipe.parallel, 1)
    manifest = open_prepared(recipe.training_directory)
    engine = build_engine(recipe, manifest.vocab_size, mesh)
    engine.eval()
    [bucket] = manifest.buckets("train")
    reader, numbers = manifest.reader(bucket), np.arange(2)
    rows, starts = reader.read(numbers), reader.document_starts(numbers)
    layout = layout_of(recipe, mesh, bucket.length)
    with torch.no_grad():
        together = engine(*layout.model_inputs(rows, starts, mesh.device)).view(2, -1)
        alone = []
        for row, at in zip(rows, starts, strict=True):
            for begin, end in zip(at, (*at[1:], bucket.length), strict=True):
                one = layout_of(recipe, mesh, end - begin).model_inputs(row[None, begin : end + 1], None, mesh.device)
                alone.append(engine(*one).flatten())
    return together.flatten().numpy(), torch.cat(alone).numpy(), max(map(len, starts))


@pytest.mark.full
def test_masked_documents_are_trained_at_positions_of_their_own(on_ranks, ordered):
    """With document masks each document is trained as if it began at position 0: RoPE depends on distances only."""
    recipe_file, overrides = ordered
    folder = recipe_file.parent
    overrides = [
        *overrides,
        f"order.directory={folder}/masked",
        "order.document_masks=true",
        "parallel.tokens_per_rank=1024",
    ]
    recipe = load_recipe(recipe_file, overrides)
    order(recipe.data, recipe.order, Console(quiet=True), workers=1)
    [(together, alone, most)] = on_ranks(1, masked_and_reset, recipe_file, overrides)
    assert most > 1
    np.testing.assert_allclose(together, alone, atol=2e-5)


def with_resets(recipe_file: Path, overrides: list[str]) -> dict[str, Any]:
    """Return the losses of this rank for rows of several documents, by a model whose losses depend on positions."""
    recipe = load_recipe(recipe_file, overrides)
    manifest = open_prepared(recipe.training_directory)
    [bucket] = manifest.buckets("train")
    mesh = join(recipe.parallel, recipe.parallel.context_parallel(bucket.length))
    engine = build_engine(recipe, manifest.vocab_size, mesh)
    engine.eval()
    assert isinstance(engine.module, torch.nn.Module)
    reader = manifest.reader(bucket)
    numbers = np.array([number for number in range(bucket.sequences) if len(reader.pieces([number])[0]) > 2])
    layout = layout_of(recipe, mesh, bucket.length)
    numbers = numbers[: 2 if layout.context_parallel == 1 else 1]
    rows, starts, _ = read_rows(reader, numbers, manifest.needs_starts, None)
    inputs = layout.model_inputs(rows, starts, mesh.device)
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            parameter.mul_(12 if "qkv" in name else 4)
        losses = engine(*inputs).view(len(rows), -1)
    weights = {name: parameter.detach().double() for name, parameter in engine.module.named_parameters()}
    weights["head.weight"] = weights["head.weight"][: manifest.vocab_size]  # the rest is padding
    positions = layout.positions(inputs[2], mesh.device).numpy()
    return {"weights": weights, "rows": rows, "starts": starts, "at": positions, "losses": losses.numpy()}


@pytest.mark.parametrize("division", by_lane(["dp1", "cp4"], quick=[]))
def test_positions_count_from_each_document(on_ranks, ordered, division, tmp_path):
    """Without masks attention sees the whole context, and RoPE rotates by the position in the document."""
    recipe_file, overrides = ordered
    resets = ["order.position_resets=true", f"order.directory={recipe_file.parent}/resets"]
    overrides = [*overrides, *resets, f"run_directory={tmp_path}"]
    recipe = load_recipe(recipe_file, overrides)
    order(recipe.data, recipe.order, Console(quiet=True), workers=1)
    found = on_ranks(1 if division == "dp1" else 4, with_resets, recipe_file, [*overrides, *DIVISIONS[division]])
    weights, rows, starts = (found[0][key] for key in ("weights", "rows", "starts"))
    in_document = [[p - max(start for start in at if start <= p) for p in range(512)] for at in starts]
    whole_rows = torch.from_numpy(rows.astype(np.int64))
    expected = plain_losses(weights, whole_rows, recipe.model, torch.tensor(in_document)).numpy()
    assert np.abs(plain_losses(weights, whole_rows, recipe.model).numpy() - expected).max() > 0.1, (
        "resets change the losses"
    )
    for rank in found:
        np.testing.assert_allclose(rank["losses"], expected[:, rank["at"]], atol=1e-3)


@pytest.mark.full
def test_the_command_orders_and_inspects(ordered, tmp_path, monkeypatch, capsys):
    recipe_file, overrides = ordered
    monkeypatch.chdir(tmp_path)
    settings = [*overrides, f"order.directory={tmp_path}/again"]
    assert cli.main(["order", str(recipe_file), *settings, "--stage", "path", "--workers", "1"]) == 0
    assert not (tmp_path / "again").exists()
    assert cli.main(["order", str(recipe_file), *settings, "--workers", "1"]) == 0
    assert "near duplicate" in capsys.readouterr().out or (tmp_path / "again" / "manifest.json").exists()
    assert cli.main(["inspect", str(recipe_file), *settings]) == 0
    assert "Ordered by path, mode in_context" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path / "again")]) == 0
    for option, value in (("--part", "3/3"), ("--part", "1"), ("--stage", "walk")):
        assert cli.main(["order", str(recipe_file), *settings, option, value]) == 2
        assert re.search(f"error: {option} '?{value}'?: ", capsys.readouterr().err)


@pytest.mark.full
def test_data_of_another_order_is_refused(ordered):
    recipe_file, overrides = ordered
    for changed, message in [
        ("order.neighbors=4", r"order\.neighbors = 4: order\.directory = .* was made with 5; set it back"),
        ("knots.chunk_odds=[0, 0, 0, 1]", r"data\.tokenizer\.knot_chunks = 3: knots\.chunk_odds needs 4"),
        ("knots.chunk_odds=2", r"knots\.chunk_odds = 2: must be a list of numbers"),
        ("data.rest=drop", r"needs every document whole"),
    ]:
        with pytest.raises(ValueError, match=message):
            preflight(load_recipe(recipe_file, [*overrides, changed, "parallel.tokens_per_rank=1024"]), 1)
