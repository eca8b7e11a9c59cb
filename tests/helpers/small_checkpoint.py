"""A small checkpoint written by hand, and a reader of checkpoints that shares no code with LongRing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from longring.launch.checkpoint.format import (
    CheckpointManifest,
    FileEntry,
    ParameterEntry,
    TrainState,
    checkpoint_name,
    write_checkpoint_manifest,
)
from longring.launch.checkpoint.tensors import write_safetensors
from safetensors.numpy import load_file

STATE = TrainState(
    run="1" * 32,
    recipe={"train": {"steps": 20}},
    data="d" * 64,
    code="c" * 64,
    packages={"torch": "2.0"},
    step=5,
    world_size=2,
    tensor=1,
    zero_stage=1,
    skipped=(3,),
    recent_losses=(1.5, 0.1),
)


def make_checkpoint(directory: Path, step: int, *, ranks: int = 2, **state: Any) -> Path:
    """Write a small complete checkpoint, whose state is STATE but for `step` and `state`; return its path."""
    path = directory / checkpoint_name(step)
    path.mkdir(parents=True)
    files = {}
    for rank in range(ranks):
        file = path / f"rank-{rank:05d}.safetensors"
        size, sha256 = write_safetensors(file, {"w/weight": torch.full((4,), float(rank))})
        files[file.name] = FileEntry(bytes=size, sha256=sha256, slice=0, ranges={"w": (4 * rank, 4)})
    parameters = {"w": ParameterEntry(shape=(4 * ranks,), cut=None)}
    manifest = CheckpointManifest(state=replace(STATE, step=step, **state), parameters=parameters, files=files)
    write_checkpoint_manifest(path, manifest)
    return path


def read_whole(path: Path) -> dict[str, np.ndarray]:
    """Return every weight and moment of a checkpoint, in the shape of the parameter, by `name/kind`."""
    manifest = json.loads((path / "manifest.json").read_text())
    size = manifest["state"]["tensor"]
    stored = sum(numel for entry in manifest["files"].values() for _, numel in entry["ranges"].values())
    assert stored == sum(math.prod(entry["shape"]) for entry in manifest["parameters"].values()), (
        "each element is stored once"
    )
    result = {}
    for name, parameter in manifest["parameters"].items():
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            slices = []
            for number in range(size if parameter["cut"] else 1):
                parts = [
                    (entry["ranges"][name][0], load_file(path / file)[f"{name}/{kind}"])
                    for file, entry in manifest["files"].items()
                    if entry["slice"] == number and name in entry["ranges"]
                ]
                flat = np.concatenate([part for _, part in sorted(parts, key=lambda part: part[0])])
                slices.append(flat)
            if not parameter["cut"]:
                [flat] = slices
                result[f"{name}/{kind}"] = flat.reshape(parameter["shape"])
                continue
            dim, stride = parameter["cut"]
            shape = list(parameter["shape"])
            shape[dim] //= size
            chunks = [np.split(flat.reshape(shape), stride, axis=dim) for flat in slices]
            ordered = [chunks[rank][at] for at in range(stride) for rank in range(size)]
            result[f"{name}/{kind}"] = np.concatenate(ordered, axis=dim)
    return result
