"""`longring import`: the weights of a Hugging Face directory as the checkpoint of a run that has done no step."""

from __future__ import annotations

import json
import shutil
import uuid
from dataclasses import fields
from itertools import groupby
from pathlib import Path

import torch

from ...data.files import sha256_of, write_text
from ...model.config import UNSCALED, ModelConfig
from ...model.families.weights import Weight, to_ours, weights_of
from ..checkpoint.format import (
    PARTIAL,
    CheckpointManifest,
    FileEntry,
    ParameterEntry,
    TrainState,
    checkpoint_name,
    publish_checkpoint,
    write_checkpoint_manifest,
)
from ..checkpoint.save import write_safetensors
from ..identity import code_hash, package_versions
from ..run_directory import RunDirectory
from ..settings import from_tree, to_tree
from .directory import CONFIG, KEPT, MAX_BYTES, ModelDirectory, new_directory

DTYPES_FILE = "dtypes.json"
"""File beside the published ones with the data type of every tensor that was imported."""

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def import_weights(source: Path, out: Path) -> ModelConfig:
    """Write the weights of a Hugging Face directory into the new directory `out`; return the model.

    Its checkpoint has fp32 weights and no moments. One layer is held in memory at a time. Raises ValueError for a model
    that is not exactly supported, and if `out` has content.
    """
    with new_directory(out) as partial, ModelDirectory(source) as directory:
        model = directory.model
        tree = {**to_tree(model.config), "vocab_size": model.vocab_size}
        config = from_tree(ModelConfig, tree, prefix="model.", source=str(source / CONFIG))
        weights = weights_of(model)
        if extra := directory.names - {name for weight in weights for name in weight.theirs} - _derived(config):
            raise ValueError(
                f"{source}: has a tensor {min(extra)}, which {CONFIG} does not explain; import another model"
            )
        if config.tied_head and _HEAD in directory.names:
            _check_tied(directory)
        state = TrainState(
            run=uuid.uuid4().hex,
            recipe={"model": to_tree(config)},
            data=sha256_of(source / CONFIG),
            code=code_hash(),
            packages=package_versions(),
            step=0,
            world_size=1,
            tensor=1,
            zero_stage=0,
        )
        manifest, dtypes = CheckpointManifest(state=state), {}
        checkpoint = partial / "checkpoints" / (checkpoint_name(0) + PARTIAL)
        checkpoint.mkdir(parents=True)
        for number, (_, layer) in enumerate(groupby(weights, key=_layer)):
            file = checkpoint / f"rank-{number:05d}.safetensors"
            dtypes |= _write_layer(file, list(layer), directory, manifest)
        write_checkpoint_manifest(checkpoint, manifest)
        publish_checkpoint(checkpoint)
        published = RunDirectory(partial).published
        published.mkdir()
        for name in KEPT:
            if (source / name).is_file() and (source / name).stat().st_size <= MAX_BYTES:
                shutil.copyfile(source / name, published / name)
        write_text(published / DTYPES_FILE, json.dumps(dtypes, indent=1))
        if (source / "tokenizer.json").is_file():
            shutil.copyfile(source / "tokenizer.json", partial / "tokenizer.json")
    return config


def _derived(config: ModelConfig) -> set[str]:
    """Return the names of tensors that some files have beside the weights they repeat."""
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(config.num_layers)}
    return buffers | ({_HEAD} if config.tied_head else set())


def _check_tied(directory: ModelDirectory) -> None:
    """Raise ValueError unless the head that is in the files is the embedding; transformers 5 would not tie it."""
    shape = (directory.model.vocab_size, directory.model.config.hidden_size)
    (embedding, _), (head, _) = (directory.tensor(name, shape) for name in (_EMBEDDING, _HEAD))
    if not torch.equal(embedding, head):
        raise ValueError(
            f"{directory.path}: {_HEAD} differs from {_EMBEDDING}, and tie_word_embeddings of {CONFIG} says that they "
            "are one; set it to false"
        )


def _layer(weight: Weight) -> str:
    """Return the part of a name that the weights of one layer share."""
    return ".".join(weight.ours.split(".")[:2])


def _write_layer(
    file: Path, weights: list[Weight], directory: ModelDirectory, manifest: CheckpointManifest
) -> dict[str, str]:
    """Write the weights of one layer, add them to the manifest, and return the data types of their tensors."""
    tensors, dtypes = {}, {}
    for weight in weights:
        theirs = []
        for name, shape in weight.theirs.items():
            tensor, dtypes[name] = directory.tensor(name, shape)
            theirs.append(tensor.float())
        whole = to_ours(weight, theirs, directory.model)
        manifest.parameters[weight.ours] = ParameterEntry(shape=tuple(whole.shape), cut=None)
        tensors[f"{weight.ours}/weight"] = whole.reshape(-1).contiguous()
    num_bytes, sha256 = write_safetensors(file, tensors, lambda: None)
    ranges = {name.removesuffix("/weight"): (0, tensor.numel()) for name, tensor in tensors.items()}
    manifest.files[file.name] = FileEntry(bytes=num_bytes, sha256=sha256, slice=0, ranges=ranges)
    return dtypes


def describe(config: ModelConfig) -> str:
    """Return the table [model] of a recipe for these weights: all settings without a default, and those that differ."""
    lines, defaults = ["[model]"], {field.name: field.default for field in fields(ModelConfig)}
    for key, value in to_tree(config).items():
        if key == "rope_scaling":
            plain = to_tree(UNSCALED)
            inner = ", ".join(f"{name} = {json.dumps(item)}" for name, item in value.items() if item != plain[name])
            lines += [f"{key} = {{ {inner} }}"] if inner else []
        elif value != json.loads(json.dumps(defaults[key], default=str)):
            lines.append(f"{key} = {json.dumps(value)}")
    return "\n".join(lines)
