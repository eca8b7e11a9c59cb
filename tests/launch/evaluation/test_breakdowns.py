"""The held-out loss by source and by length of document, against plain PyTorch and the documents themselves."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from helpers.lanes import by_lane
from helpers.plain_model import plain_losses
from longring.data.format.manifest import open_prepared
from longring.data.prepare.prepare import prepare
from longring.launch.build import build_engine, open_layouts
from longring.launch.config import load_recipe
from longring.launch.evaluation.buckets import held_out_buckets
from longring.launch.evaluation.documents import DocumentLengths
from longring.launch.evaluation.held_out import HeldOutLoss, with_means
from longring.launch.evaluation.key_tokens import KeyTokens
from longring.launch.evaluation.long_context import long_context
from longring.launch.evaluation.score import Row, Scorer
from longring.parallel.mesh import join
from rich.console import Console


def recipe_of(recipe_file: Path, directory: Path, *overrides: str) -> Any:
    """Return the recipe on data of two sources, whose documents have lengths of their own."""
    sources = [
        f"data.sources.{name}={{kind='json', path='{directory}/{name}.jsonl'}}" for name in ("plain", "backwards")
    ]
    data = ["data.held_out_fraction=0.4", f"data.directory={directory}/data", "model.init_std=0.2"]
    return load_recipe(recipe_file, ["data.source={}", *sources, *data, *overrides])


@pytest.fixture(scope="module")
def directory(recipe_file, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("sources")
    text = Path(argparse.__file__).read_text()
    for name, source in (("plain", text), ("backwards", text[::-1])):
        documents = [source[700 * n : 700 * n + 150 + 120 * (n % 9)] for n in range(30)]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
    prepare(recipe_of(recipe_file, directory).data, Console(quiet=True))
    return directory


def measured(recipe_file: Path, directory: Path, limit: int, *overrides: str) -> tuple[dict[str, Any], list[Any]]:
    """Return what the losses are by class, and each target's (source, length of document, loss) by plain PyTorch."""
    recipe = recipe_of(recipe_file, directory, f"evaluate.max_tokens_per_bucket={limit}", *overrides)
    manifest = open_prepared(recipe.data.directory)
    mesh = join(recipe.parallel, recipe.max_context_parallel, 5)
    engine = build_engine(recipe, manifest.vocab_size, mesh)
    engine.eval()
    chosen = held_out_buckets(recipe, manifest)
    layouts = open_layouts(recipe, mesh, [bucket.length for bucket, _ in chosen], lambda _: None)
    loss = HeldOutLoss(engine, recipe, manifest, mesh, lambda _: None, DocumentLengths(manifest))
    found = with_means([loss.bucket(bucket, number, layouts[bucket.length]) for bucket, number in chosen])
    if mesh.rank or mesh.world_size > 1:
        return found, []
    weights = {name.removeprefix("module."): weight.detach().double() for name, weight in engine.named_parameters()}
    tokenizer, targets = manifest.tokenizer().tokenizer, []
    for bucket, number in chosen:
        numbers = np.arange(number) * bucket.sequences // number
        reader = manifest.reader(bucket)
        rows = torch.from_numpy(reader.read(numbers).astype(np.int64))
        losses = plain_losses(weights, rows, recipe.model, vocab_size=manifest.vocab_size)
        for pieces, of_row in zip(reader.pieces(numbers), losses.tolist(), strict=True):
            [(shard, record, _, _)] = pieces.tolist()
            source = manifest.inputs()[shard]["source"]
            document = json.loads((directory / f"{source}.jsonl").read_text().splitlines()[record])["text"]
            # With its end a document has one target more than tokens; what is shorter than a bucket is left out.
            length = (len(tokenizer.encode(document, add_special_tokens=False).ids) + 1) // 64 * 64
            targets += [(source, length, one) for one in of_row]
    return found, targets


def assert_means(entries: list[dict[str, Any]], expected: dict[Any, list[float]]) -> None:
    assert [entry["tokens"] for entry in entries] == [len(losses) for losses in expected.values()]
    assert [entry["loss"] for entry in entries] == pytest.approx(
        [np.mean(found) for found in expected.values()], rel=1e-5
    )


@pytest.mark.parametrize("limit", by_lane([2**20, 800], quick=[], slow=[2**20]), ids=["all", "capped"])
def test_losses_by_source_and_length_of_document_equal_plain_pytorch(on_ranks, recipe_file, directory, limit):
    [(found, targets)] = on_ranks(1, measured, recipe_file, directory, limit)
    by_source, by_length = defaultdict(list), defaultdict(list)
    for source, length, loss in targets:
        by_source[source].append(loss)
        by_length[max(64, 2 ** int(np.ceil(np.log2(length))))].append(loss)
    assert [entry["source"] for entry in found["by_source"]] == ["plain", "backwards"] == sorted(by_source)[::-1]
    assert_means(found["by_source"], {name: by_source[name] for name in ("plain", "backwards")})
    assert [entry["to"] for entry in found["by_document"]] == sorted(by_length) and len(by_length) > 2
    assert_means(found["by_document"], dict(sorted(by_length.items())))
    for several, _ in on_ranks(2, measured, recipe_file, directory, limit, "parallel.tokens_per_rank=256"):
        for name in ("by_source", "by_document"):
            for entry, one in zip(several[name], found[name], strict=True):
                assert entry == {**one, "loss": pytest.approx(one["loss"], rel=1e-4)}


class Recorder:
    """A scorer that keeps the tokens that it is given."""

    def __init__(self, length: int) -> None:
        self.layout = SimpleNamespace(length=length)
        self.read: set[bytes] = set()

    def sums(self, num_rows: int, num_parts: int, row: Callable[[int], Row]) -> np.ndarray:
        self.read |= {row(number).tokens.tobytes() for number in range(num_rows)}
        return np.ones((num_rows, num_parts, 3))

    def losses(self, num_rows: int, row: Callable[[int], Row]) -> Iterator[np.ndarray]:
        self.read |= {row(number).tokens.tobytes() for number in range(num_rows)}
        return iter(np.zeros((num_rows, self.layout.length)))


@pytest.mark.parametrize(
    "short_tokens", by_lane([64, 4096], quick=[4096]), ids=["with LongPPL", "gain of context alone"]
)
def test_gain_of_context_and_long_ppl_read_every_source(recipe_file, directory, short_tokens):
    settings = ["evaluate.context_sequences=2", f"evaluate.short_tokens={short_tokens}"]
    recipe = recipe_of(recipe_file, directory, *settings)
    manifest = open_prepared(recipe.data.directory)
    [bucket] = [bucket for bucket in manifest.buckets("held_out") if bucket.length == 128]
    recorder = Recorder(bucket.length)
    found: dict[str, Any] = {"left_out": []}
    long_context(recipe.evaluate, manifest, [cast(Scorer, recorder)], found)
    told = "evaluate.short_tokens = 4096: LongPPL takes longer sequences; lower it"
    without = [] if short_tokens == 64 else [{"task": "long_ppl", "length": 128, "reason": told}]
    assert found["left_out"] == without and len(found["long_ppl"]) == 1 - len(without)
    ends = np.cumsum([part.sequences for part in bucket.parts])
    rows = manifest.reader(bucket).read(np.arange(bucket.sequences)).astype(np.int64)
    numbers = [number for number, row in enumerate(rows) if row.tobytes() in recorder.read]
    assert len(recorder.read) == 2
    assert set(np.searchsorted(ends, numbers, side="right")) == {0, 1}


def test_a_bucket_too_short_for_a_gain_of_context_is_told(recipe_file, directory, monkeypatch):
    recipe = recipe_of(recipe_file, directory, "evaluate.context_sequences=2")
    manifest = open_prepared(recipe.data.directory)
    monkeypatch.setattr("longring.launch.evaluation.long_context.EIGHTHS", 100)  # the data has no bucket below 8
    found: dict[str, Any] = {"left_out": []}
    long_context(recipe.evaluate, manifest, [cast(Scorer, Recorder(length)) for length in (64, 128)], found)
    [left_out] = [entry for entry in found["left_out"] if entry["task"] == "context"]
    assert left_out["length"] == 64
    assert left_out["reason"] == "the gain of context takes at least 100 tokens; take a longer bucket"
    assert [entry["length"] for entry in found["context"]] == [128]


def test_key_tokens_of_a_judge_count_for_the_model_that_is_judged(recipe_file, directory):
    settings = ["evaluate.context_sequences=2", "evaluate.short_tokens=64"]
    recipe = recipe_of(recipe_file, directory, *settings)
    manifest = open_prepared(recipe.data.directory)
    keys = np.zeros((2, 128), dtype=np.bool_)
    keys[0, [70, 90]] = keys[1, 127] = True
    found: dict[str, Any] = {"left_out": []}
    scorer = cast(Scorer, Recorder(128))
    long_context(recipe.evaluate, manifest, [scorer], found, KeyTokens("the judge", {128: keys}))
    [entry] = found["long_ppl"]
    assert (entry["judge"], entry["key_tokens"], entry["long_ppl"]) == ("the judge", 3, 1.0)
