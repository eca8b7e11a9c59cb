"""Hugging Face directories with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from longring.model.families.read import PublishedModel
from longring.model.families.weights import weights_of
from longring.model.families.write import write_config
from safetensors.torch import save_file
from torch import Tensor


def write_model(directory: Path, model: PublishedModel, num_files: int = 1) -> dict[str, Tensor]:
    """Write config.json and random weights, norms in fp32 and all others in bf16; return the tensors by name."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for weight in weights_of(model):
        for name, shape in weight.theirs.items():
            values = torch.randn(shape, generator=generator)
            tensors[name] = values if "norm" in name else values.bfloat16()
    (directory / "config.json").write_text(json.dumps(write_config(model), indent=2))
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
