"""A complete checkpoint of one small parameter, written by hand."""

from __future__ import annotations

from pathlib import Path

import torch
from longring.launch import checkpoint
from longring.launch.checkpoint import FileEntry, Manifest, ParameterEntry, TrainState
from longring.launch.checkpoint_save import write_safetensors

STATE = TrainState(step=5, updates=5, data="d" * 64, world_size=2, tensor=1, zero_stage=1, recent_losses=(1.5, 0.1))


def make(directory: Path, step: int, *, ranks: int = 2) -> Path:
    """A small complete checkpoint, written by hand."""
    path = directory / checkpoint.name_of(step)
    path.mkdir(parents=True)
    files = {}
    for rank in range(ranks):
        file = path / f"rank-{rank:05d}.safetensors"
        size, sha256 = write_safetensors(file, {"w/weight": torch.full((4,), float(rank))}, lambda: None)
        files[file.name] = FileEntry(bytes=size, sha256=sha256, slice=0, ranges={"w": (4 * rank, 4)})
    state = TrainState(**{**STATE.__dict__, "step": step})
    parameters = {"w": ParameterEntry(shape=(4 * ranks,), cut=None)}
    checkpoint.write_manifest(path, Manifest(state=state, parameters=parameters, files=files))
    return path
