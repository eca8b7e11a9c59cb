"""`longring import`: the weights of a Hugging Face directory as the checkpoint of a run that has done no step."""

from __future__ import annotations

import json
import math
import uuid
from dataclasses import fields
from itertools import groupby
from pathlib import Path

from ...data.files import copy_whole, sha256_of, write_text
from ...model.config import UNSCALED, ModelConfig
from ..checkpoint.format import (
    PARTIAL,
    CheckpointManifest,
    FileEntry,
    TrainState,
    checkpoint_name,
    publish_checkpoint,
    write_checkpoint_manifest,
)
from ..checkpoint.stored import read_whole
from ..checkpoint.tensors import write_one_by_one
from ..identity import code_hash, package_versions
from ..run_directory import RunDirectory
from ..settings import to_tree
from .directory import CONFIG, ModelDirectory, keep_files
from .new_directory import new_directory

DTYPES_FILE = "dtypes.json"
"""File beside the published ones with the data type of every tensor that was imported."""


def import_weights(source: Path, out: Path) -> ModelConfig:
    """Write the weights of a Hugging Face directory into the new directory `out`; return the model.

    Its checkpoint has fp32 weights and no moments. One weight is held in memory at a time. Raises ValueError for a
    model that is not exactly supported, and if `out` has content.
    """
    with new_directory(out) as partial, ModelDirectory(source) as directory:
        config = directory.config
        state = TrainState(
            run=uuid.uuid4().hex,
            recipe={"model": to_tree(config)},
            data=sha256_of(source / CONFIG),  # stands for data, of which an import has none
            code=code_hash(),
            packages=package_versions(),
            step=0,
            world_size=1,
            tensor=1,
            zero_stage=0,
        )
        manifest = CheckpointManifest(state=state, parameters=dict(directory.parameters))
        checkpoint = partial / "checkpoints" / (checkpoint_name(0) + PARTIAL)
        checkpoint.mkdir(parents=True)
        # The weights of one layer have the same two first words.
        for number, (_, layer) in enumerate(groupby(directory.parameters, key=lambda name: name.split(".")[:2])):
            _write_layer(checkpoint / f"rank-{number:05d}.safetensors", list(layer), directory, manifest)
        # Last, since every layer has added its file to the manifest.
        write_checkpoint_manifest(checkpoint, manifest)
        publish_checkpoint(checkpoint)
        published = RunDirectory(partial).published
        keep_files(source, published)
        write_text(published / DTYPES_FILE, json.dumps(directory.dtypes, indent=1))
        if (source / "tokenizer.json").is_file():
            copy_whole(source / "tokenizer.json", partial / "tokenizer.json")
    return config


def _write_layer(file: Path, names: list[str], directory: ModelDirectory, manifest: CheckpointManifest) -> None:
    """Write the weights of one layer, each when it is read, and add their file to the manifest."""
    shapes = {name: (math.prod(directory.parameters[name].shape),) for name in names}  # flat: a range is the whole
    described = {f"{name}/weight": ("F32", shape) for name, shape in shapes.items()}
    weights = (read_whole(directory, name).view(-1) for name in names)
    num_bytes, sha256 = write_one_by_one(file, described, weights)
    ranges = {name: (0, numel) for name, [numel] in shapes.items()}
    manifest.files[file.name] = FileEntry(bytes=num_bytes, sha256=sha256, slice=0, ranges=ranges)


def describe(config: ModelConfig) -> str:
    """Return the table [model] of a recipe for these weights: all settings without a default, and those that differ."""
    lines, defaults = ["[model]"], {field.name: field.default for field in fields(ModelConfig)}
    for key, value in to_tree(config).items():
        if key == "rope_scaling":
            plain = to_tree(UNSCALED)
            inner = ", ".join(f"{name} = {json.dumps(item)}" for name, item in value.items() if item != plain[name])
            lines += [f"{key} = {{ {inner} }}"] if inner else []
        # Defaults as JSON holds them, tuples as lists; a setting without one gets a text that no value equals.
        elif value != json.loads(json.dumps(defaults[key], default=str)):
            lines.append(f"{key} = {json.dumps(value)}")
    return "\n".join(lines)
