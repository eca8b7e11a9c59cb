"""FLOPs, bytes and times of steps against other counts."""

from __future__ import annotations

import gzip
import json
import logging
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.plain_model import plain_losses
from hypothesis import given
from hypothesis import strategies as st
from longring.data.format.manifest import open_prepared
from longring.launch.config import load_recipe
from longring.launch.flops import ModelFlops, document_lengths, visible_pairs
from longring.launch.meter import Meter, bytes_per_token, checked_share
from longring.launch.records import read_records
from longring.launch.run_directory import RunDirectory
from longring.model.config import ModelConfig
from torch.utils.flop_counter import FlopCounterMode

MODEL = ModelConfig(num_layers=3, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=12, ffn_hidden_size=40)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.none() | st.integers(1, 50))
def test_pairs_are_those_of_the_mask(lengths, window):
    queries, keys = np.arange(40)[:, None], np.arange(40)
    seen = (keys <= queries) & (queries - keys < (window or 40))
    expected = [int(seen[:length, :length].sum()) for length in lengths]
    assert visible_pairs(np.array(lengths), window).tolist() == expected


def test_flops_are_those_that_torch_counts():
    """torch's counter sees the products of a plain model, in which every query meets every key."""
    shapes = {"embedding.weight": (50, 32), "norm.weight": (32,), "head.weight": (50, 32)}
    of_layer = {
        **{"attention_norm.weight": (32,), "mlp_norm.weight": (32,), "attention.qkv.weight": (8 * 12, 32)},
        **{"attention.out.weight": (32, 48), "mlp.gate_up.weight": (80, 32), "mlp.down.weight": (32, 40)},
    }
    for layer in range(MODEL.num_layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in of_layer.items()}
    weights = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    with FlopCounterMode(display=False) as counter:
        plain_losses(weights, torch.randint(50, (2, 25)), MODEL).sum().backward()
    flops = ModelFlops.of(MODEL, 50)
    assert flops.matrices(2 * 24) + flops.dense_attention(2 * 24, 24) == counter.get_total_flops()


def meter_of(recipe_file, **mesh: Any) -> Meter:
    recipe = load_recipe(recipe_file)
    described = SimpleNamespace(device=torch.device("cpu"), rank=0, **{"world_size": 4, **mesh})
    return Meter(recipe, open_prepared(recipe.data.directory), described)  # type: ignore[arg-type]


def test_the_ranks_of_a_ring_count_a_sequence_once(recipe_file):
    rows = np.zeros((2, 101), np.uint16)
    batch = SimpleNamespace(rows=rows, length=100, document_starts=((0, 30), (0,)))
    documents = [*document_lengths((0, 30), 100), 100]
    for masks, expected in ((True, documents), (False, [100, 100])):
        meter, flops = meter_of(recipe_file), 0.0
        for _ in range(4):
            meter.add(batch, SimpleNamespace(document_masks=masks, context_parallel=4))  # type: ignore[arg-type]
            flops += meter.take_attention_flops()
        assert flops == pytest.approx(meter._flops.attention(expected))


def test_a_share_above_the_peak_is_refused(caplog):
    assert checked_share(4e14, 8e14) == 0.5
    assert math.isnan(checked_share(4e14, math.nan))
    with caplog.at_level(logging.ERROR):
        assert math.isnan(checked_share(9e14, 8e14))
    assert "above the device's peak" in caplog.text


def test_bytes_of_tokens_are_those_of_the_text(recipe_file):
    manifest = open_prepared(load_recipe(recipe_file).data.directory)
    text, tokenizer = "def naïve(self): return '日本語 😀'\n" * 3, manifest.tokenizer()
    ids = tokenizer.tokenizer.encode(text).ids
    counts = np.bincount([*ids, tokenizer.boundary_id], minlength=manifest.vocab_size)
    described: Any = SimpleNamespace(
        tokenizer=lambda: tokenizer, tokenizer_json=manifest.tokenizer_json, unigram=lambda: counts
    )
    assert bytes_per_token(described) == pytest.approx(len(text.encode()) / (len(ids) + 1))
    other: Any = SimpleNamespace(tokenizer_json=lambda: json.dumps({"decoder": {"type": "Metaspace"}}))
    assert math.isnan(bytes_per_token(other))


@pytest.mark.full
def test_the_metrics_of_a_run(whole):
    """Rates follow from the buckets, parts lie within their step, and the trace has the regions of its steps."""
    run = RunDirectory(whole.path)
    recipe = run.recipe()
    flops = ModelFlops.of(recipe.model, open_prepared(recipe.data.directory).vocab_size)
    records = read_records(run.metrics_file)
    for record in records:
        expected = sum(
            flops.matrices(part["targets"]) + part["targets"] / int(length) * flops.attention([int(length)])
            for length, part in record["buckets"].items()
        )
        assert record["tflops"] * 1e12 * record["step_ms"] / 1e3 * 2 == pytest.approx(expected, rel=1e-6)
        assert record["mfu"] is record["mfu_dense"] is None, "the peak of a CPU is not known"
        assert 0.2 < record["bits_per_byte"] / record["loss"] < 1.5
        assert {"data", "forward", "backward", "optimizer", "communication", "sum"} <= record["ms"].keys()
        assert all(ms >= 0 for ms in record["ms"].values())
        assert sum(ms for part, ms in record["ms"].items() if part != "save") <= record["step_ms"]
    assert any("save" in record["ms"] for record in records)
    [trace] = run.logs.glob("trace-*")
    assert trace.name == "trace-00001-steps-3-4.json.gz"
    names = [event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    steps = [name for name in names if name == "sum"]
    assert len(steps) == 2
    assert {"data", "forward", "backward", "optimizer"} <= set(names)
