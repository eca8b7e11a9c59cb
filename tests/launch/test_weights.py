"""Weights in and out: a Hugging Face directory becomes a checkpoint and again itself, and a run becomes a model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_checkpoint import read_whole
from longring.launch import cli
from longring.launch.checkpoint.format import read_checkpoint_manifest
from longring.launch.config import load_recipe
from longring.launch.run_directory import RunDirectory
from longring.launch.train import train
from longring.launch.weights import give_out
from longring.launch.weights.bring_in import describe, import_weights
from longring.launch.weights.give_out import export_weights
from longring.model.config import ModelConfig, RopeScaling
from longring.model.families.read import PublishedModel
from longring.model.families.weights import weights_of
from longring.model.families.write import write_config
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

SIZES: dict[str, Any] = {"num_layers": 3, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 48}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": RopeScaling(kind="llama3", factor=8, original_tokens=8192)},
    "qwen2": {"qkv_bias": True, "tied_head": True},
    "olmo3": {
        **{"qk_norm": "projection", "norm_order": "after", "layer_pattern": ("window", "full"), "window_tokens": 8},
        "rope_scaling": RopeScaling(kind="yarn", factor=8, original_tokens=8192, full_layers_only=True),
    },
}


def published(family: str) -> PublishedModel:
    other = {"torch_dtype": "bfloat16", "eos_token_id": [1, 2]}
    config = ModelConfig(**SIZES, **CONFIGS[family])
    return PublishedModel(family=family, config=config, vocab_size=300, max_tokens=65_536, other=other)


def make_model(directory: Path, family: str = "llama", num_files: int = 1) -> dict[str, Tensor]:
    """Write a Hugging Face directory with random weights in bf16, norms in fp32; return its tensors."""
    directory.mkdir()
    model = published(family)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for weight in weights_of(model):
        for name, shape in weight.theirs.items():
            values = torch.randn(shape, generator=generator)
            tensors[name] = values if "norm" in name else values.bfloat16()
    (directory / "config.json").write_text(json.dumps(write_config(model), indent=2))
    (directory / "tokenizer.json").write_text('{"some": "tokenizer"}')
    (directory / "generation_config.json").write_text('{"do_sample": true}')
    files: dict[str, dict[str, Tensor]] = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        file = "model.safetensors" if num_files == 1 else f"model-{number % num_files:05d}.safetensors"
        files.setdefault(file, {})[name] = tensor
    for file, part in files.items():
        save_file(part, directory / file, metadata={"format": "pt"})
    if num_files > 1:
        index = {"weight_map": {name: file for file, part in files.items() for name in part}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def read_model(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_imported_is_exported_bit_by_bit(tmp_path, monkeypatch, family):
    tensors = make_model(tmp_path / "model", family, num_files=3)
    import_weights(tmp_path / "model", tmp_path / "run")
    monkeypatch.setattr(give_out, "SHARD_BYTES", 30_000)
    export_weights(RunDirectory(tmp_path / "run"), tmp_path / "again")
    found = read_model(tmp_path / "again")
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in tensors.items())
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert len(set(index["weight_map"].values())) > 2
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "again" / file)


def test_imported_weights_are_a_checkpoint_after_no_step(tmp_path):
    tensors = make_model(tmp_path / "model")
    config = import_weights(tmp_path / "model", tmp_path / "run")
    manifest = read_checkpoint_manifest(tmp_path / "run" / "checkpoints" / "step-00000000")
    assert manifest.state.step == 0
    assert manifest.parameters["embedding.weight"].shape == (384, 32)
    assert manifest.parameters["blocks.2.attention.qkv.weight"].cut is None
    assert config.vocab_size == 300
    assert sum(math.prod(entry.shape) for entry in manifest.parameters.values()) == (
        sum(t.numel() for t in tensors.values()) + 2 * 84 * 32
    )


def test_the_described_model_is_that_of_the_weights(tmp_path):
    make_model(tmp_path / "model", "olmo3")
    config = import_weights(tmp_path / "model", tmp_path / "run")
    import tomllib

    from longring.launch.settings import from_tree

    assert from_tree(ModelConfig, tomllib.loads(describe(config))["model"]) == config


def test_a_dtype_may_be_chosen(tmp_path):
    tensors = make_model(tmp_path / "model")
    import_weights(tmp_path / "model", tmp_path / "run")
    export_weights(RunDirectory(tmp_path / "run"), tmp_path / "again", dtype="F32")
    found = read_model(tmp_path / "again")
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in tensors.items())
    assert json.loads((tmp_path / "again" / "config.json").read_text())["torch_dtype"] == "float32"


def run_steps(recipe_file: Path, overrides: list[str]) -> None:
    train(load_recipe(recipe_file, overrides), Console(quiet=True))


MODEL = ["model.qk_norm=head", "model.tied_head=true", "model.vocab_size=600"]


@pytest.mark.full
def test_a_run_is_exported_imported_and_trained_on(on_ranks, recipe_file, tmp_path):
    """transformers computes the loss of the exported model; a run that begins from it has this loss in its first step."""
    transformers = pytest.importorskip("transformers")
    first = [*MODEL, "train.steps=5", "parallel.tensor=2", "parallel.zero_stage=3"]
    on_ranks(2, run_steps, recipe_file, [*first, f"run_directory={tmp_path}/first"])
    export, again = tmp_path / "model", tmp_path / "imported"
    assert cli.main(["export", f"{tmp_path}/first", str(export), "--dtype", "F32"]) == 0
    saved = read_whole(tmp_path / "first" / "checkpoints" / "step-00000005")
    model = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    assert len(tokenizer) == 500
    assert model.config.vocab_size == 600
    embedding = model.get_input_embeddings().weight.detach()
    assert torch.equal(embedding, torch.from_numpy(saved["embedding.weight/weight"])[:600])
    assert cli.main(["import", str(export), str(again)]) == 0
    # A step of rate 0 leaves the weights as they are.
    second = [*MODEL, "train.steps=2", "train.warmup_steps=1", "train.learning_rate=1e-30", "train.min_learning_rate=0"]
    overrides = [
        *second,
        f"init.from={again}",
        f"run_directory={tmp_path}/second",
        f"data.tokenizer.path={again}/tokenizer.json",
    ]
    on_ranks(1, run_steps, recipe_file, overrides[:-1])
    kept = read_whole(tmp_path / "second" / "checkpoints" / "step-00000002")
    assert all(
        (kept[name] == saved[name]).all() for name in saved if name.endswith("/weight") and "embedding" not in name
    )
    assert (kept["embedding.weight/weight"][:600] == saved["embedding.weight/weight"][:600]).all()
