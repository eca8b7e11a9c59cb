"""`longring plan --gpus N --device NAME`: tables at 80 columns, JSON, answers of the search, mistakes in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from longring.data.format.manifest import Manifest, open_prepared
from longring.launch import cli
from longring.launch.config import load_recipe

RECIPES = Path(__file__).parents[3] / "launch" / "recipes"
LLAMA = str(RECIPES / "llama-3.1-8b-1m.toml")
HALF = "train.dtype=bfloat16"
SMALL = "parallel.tokens_per_rank=256"


def measured(device: Mapping[str, object], fabric: Mapping[str, object]) -> dict[str, object]:
    """Return the content of a device file of one node of 2 ranks, with other values of its device or its links."""
    from longring.launch.fit.device import device_json, named_device

    inside = {"kind": "switch", "bytes_per_s": 1e9, "latency_s": 1e-5, "ends_per_port": 1, "full_duplex": True}
    topology = {"name": "probe", "ranks_per_node": 2, "inside": {**inside, **fabric}, "across": None, "copies": None}
    return {"topology": topology, "device": {**device_json(named_device("h100")), **device}}


def run(capsys, *arguments: str) -> str:
    assert cli.main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_a_prepared_recipe_has_days_and_passes(capsys, recipe_file):
    arguments = [str(recipe_file), HALF, "parallel.tokens_per_rank=256", "--gpus", "2", "--device", "h100"]
    found = json.loads(run(capsys, *arguments, "--json"))
    recipe = load_recipe(recipe_file)
    assert sum(found["tokens_by_bucket"].values()) == recipe.train.steps * recipe.train.global_batch_tokens
    data: Manifest = open_prepared(recipe.training_directory, recipe.loader, check_shards=False)
    available = sum(bucket.length * bucket.sequences for bucket in data.buckets("train"))
    assert found["passes"] == pytest.approx(20 * 2048 / available)
    steps = {int(length): tokens / 2048 for length, tokens in found["tokens_by_bucket"].items()}
    seconds = sum(steps[bucket["length"]] * bucket["step_s"] for bucket in found["recipe"]["buckets"])
    assert found["days"] == pytest.approx(seconds / 86_400)
    for bucket in found["recipe"]["buckets"]:
        assert sum(bucket["parts_s"].values()) == pytest.approx(bucket["step_s"])
        assert sum(bucket["kinds_bytes"].values()) == bucket["memory_bytes"]
        assert bucket["tokens_per_s"] == pytest.approx(2048 / bucket["step_s"])
        assert 0 < bucket["mfu"] < 1
        assert [grid["cp"] for grid in bucket["grids"]] == [bucket["cp"]] * (bucket["cp"] > 1)
    text = " ".join(run(capsys, *arguments).split())
    assert re.search(r"20 steps of 2,048 tokens are 0.041M tokens: [\d.e-]+ days, [\d.]+ passes over the data", text)


@pytest.mark.slow
def test_a_million_tokens_on_64_gpus_are_whole_at_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = run(capsys, LLAMA, "train.memory.activations=keep", "--gpus", "64", "--device", "h100")
    tables = text[text.index("Steps by bucket") :]
    assert max(map(len, tables.splitlines())) <= 80
    assert "…" not in text
    words = " ".join(text.split())
    assert "64 ranks, 32,768 tokens on each, 2 micro-batches a step; vocabulary of 128,256" in words
    assert "does not fit: " in words
    assert re.search(r"GiB too much; activations take [\d.]+ GiB", words)
    for row in ("1,048,576", "recipe", "nearest", "best 1", "best 3", "of the device", "hidden"):
        assert row in text
    assert re.search(r"nearest .* (train\.memory|parallel)\.[a-z_]+=", text)
    assert "longest context that fits at this batch: 4,194,304 tokens" in words
    assert "days and passes of the run are known once data/llama-3.1-1m is prepared" in words


@pytest.mark.full
def test_a_model_that_fits_no_setting_says_so(capsys, recipe_file):
    large = ["model.num_layers=10000", "model.hidden_size=65536", "model.ffn_hidden_size=65536"]
    text = " ".join(run(capsys, str(recipe_file), HALF, *large, "--gpus", "1", "--device", "a100").split())
    assert "no setting of the search fits; take more GPUs, or a smaller model" in text


@pytest.mark.full
@pytest.mark.parametrize(
    ("arguments", "advice", "more"),
    [
        ([HALF, "--gpus", "8", "--device", "h1000"], "must be one of a100, (h100), h200, b200, or a file", "{0}"),
        ([HALF, "--gpus", "8"], "needs --device; add --device (h100)", "{0}"),
        (["--gpus", "8", "--device", "h100"], "set train.dtype = (bfloat16)", "train.dtype={0}"),
    ],
)
def test_advice_about_the_device(capsys, recipe_file, arguments, advice, more):
    assert cli.main(["plan", str(recipe_file), SMALL, *arguments]) == 2
    error = " ".join(capsys.readouterr().err.split())
    found = re.search(advice, error)
    assert found, error
    right = more.format(*found.groups())
    arguments = [x for x in arguments if x not in ("--device", "h1000", "h100")]
    if right.startswith("train."):
        arguments += [right]
        right = "h100"
    run(capsys, str(recipe_file), SMALL, *arguments, "--device", right)


@pytest.mark.full
def test_advice_about_gpus_and_other_options(capsys, recipe_file, tmp_path):
    planned = ["plan", str(recipe_file), HALF, SMALL, "--device", "h100"]
    gpus = [*planned, "--gpus", "8"]
    for wrong, advice in (
        (planned, "needs --gpus; add --gpus 64"),
        ([*gpus, "--ranks", "4"], "--ranks: has no part in a plan with --gpus; leave out --gpus and --device"),
        ([*planned, "--gpus", "16"], "train.global_batch_tokens = 2048: must be a multiple of the 4096 tokens"),
        ([*gpus, "--topology", "token_ring"], "--topology token_ring: must be one of nvswitch"),
    ):
        assert cli.main(wrong) == 2
        assert advice in " ".join(capsys.readouterr().err.split())
    assert cli.main([*planned, "--gpus", "64", "train.global_batch_tokens=16384"]) == 0
    assert cli.main(["plan", str(recipe_file), HALF, SMALL, "--ranks", "4"]) == 0
    other = tmp_path / "other.json"
    for device, fabric in ((None, {}), ({"product_flops": 0}, {}), ({"peak_flops": "1"}, {}), ({}, {"bytes_per_s": 0})):
        other.write_text(json.dumps({} if device is None else measured(device, fabric)))
        assert cli.main(["plan", str(recipe_file), SMALL, "--gpus", "2", "--device", str(other)]) == 2
        error = " ".join(capsys.readouterr().err.split())
        # tests/launch/commands/test_topology.py carries this out.
        assert "has no measured device; write it with `longring topology RECIPE --json" in error


@pytest.mark.full
def test_a_topology_of_one_node_has_no_more_ranks(capsys, recipe_file, tmp_path):
    """More ranks than a node has are refused for a file that one node wrote, unless a preset replaces its links."""
    file = tmp_path / "node.json"
    file.write_text(json.dumps(measured({}, {})))
    arguments = ["plan", str(recipe_file), "--gpus", "4", "--device", str(file)]
    assert cli.main(arguments) == 2
    assert "name one of several nodes, such as --topology infiniband" in " ".join(capsys.readouterr().err.split())
    assert cli.main([*arguments, "--topology", "infiniband"]) == 0
