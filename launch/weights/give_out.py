"""`longring export`: the last checkpoint of a run as a Hugging Face directory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ...data.files import copy_whole, write_text
from ...data.format.tokenizer_file import load_tokenizer
from ...model.config import ModelConfig
from ...model.families.family import FAMILIES
from ...model.families.read import PublishedModel, read_config
from ...model.families.weights import Weight, to_theirs, weights_of
from ...model.families.write import family_of, write_config
from ..checkpoint.files import CheckpointFiles
from ..checkpoint.format import CheckpointManifest, find_damage, last_good_checkpoint, no_good_checkpoint
from ..checkpoint.stored import read_whole
from ..checkpoint.tensors import DTYPES, write_one_by_one
from ..run_directory import RunDirectory
from .bring_in import DTYPES_FILE
from .directory import CONFIG, INDEX, WEIGHTS, keep_files, read_json
from .new_directory import new_directory

SHARD_BYTES = 5 * 10**9
"""Largest number of bytes of one file of weights, if it has more than one tensor."""
_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def export_weights(run: RunDirectory, out: Path, *, family: str = "", dtype: str = "") -> PublishedModel:
    """Write the last checkpoint of a run, or imported weights, as a Hugging Face directory `out`; return the model.

    `family` is its `model_type`, by default the first that has the settings; `dtype` its data type, by default that of
    the run or of the import. The model claims the longest bucket of the run as its context; where the run began from a
    published model and has kept its RoPE and windows, at least the context of that model. One weight is held in memory
    at a time. Raises ValueError if there is no checkpoint, if no family has the settings, and if `out` has content.
    """
    if family and family not in FAMILIES:
        raise ValueError(f"--family {family}: must be one of {', '.join(FAMILIES)}")
    if not run.recipe_file.is_file() and not run.checkpoints.is_dir():
        raise ValueError(
            f"{run.path}: neither a run nor an import; name a directory that `longring train` or `longring import` has "
            "written"
        )
    if (found := last_good_checkpoint(run.checkpoints)) is None:
        raise no_good_checkpoint(run.checkpoints)
    checkpoint, manifest = found
    if wrong := find_damage(checkpoint, manifest):
        raise ValueError(f"{wrong}; bring back a copy of it, or remove {checkpoint} to export the checkpoint before")
    imported = not run.recipe_file.is_file() and (run.published / CONFIG).is_file()
    model = _imported(run, family) if imported else _trained(run, family)
    as_was: dict[str, str] = read_json(run.published / DTYPES_FILE) if imported else {}
    default = dtype or ("F32" if not imported and run.recipe().train.dtype == "float32" else "BF16")
    dtypes = {name: dtype or as_was.get(name, default) for weight in weights_of(model) for name in weight.theirs}
    _check_vocabulary(model, manifest)
    with new_directory(out) as partial, CheckpointFiles(checkpoint, manifest) as stored:
        _write_weights(partial, model, dtypes, stored)
        other_dtype = "" if imported and not dtype else default
        _write_files(partial, run, model, imported and not dtype and not family, other_dtype)
    return model


def _imported(run: RunDirectory, family: str) -> PublishedModel:
    """Return the model of a directory that `longring import` has written, as one of a family."""
    model = read_config(read_json(run.published / CONFIG))
    return replace(model, family=family or model.family)


def _trained(run: RunDirectory, family: str) -> PublishedModel:
    """Return the model of a run as one of a family; a run from a published model keeps its family and token ids."""
    recipe, file = run.recipe(), run.tokenizer_file
    if not file.is_file():
        raise ValueError(f"{file}: missing; copy tokenizer.json of the data that the run was trained on to there")
    tokenizer = load_tokenizer(file.read_bytes(), str(file))
    boundary = tokenizer.token_to_id(recipe.data.tokenizer.boundary)
    vocab_size = recipe.model.num_tokens(tokenizer.get_vocab_size(with_added_tokens=True))
    other = {"bos_token_id": boundary, "eos_token_id": boundary, "pad_token_id": None, "use_cache": True}
    max_tokens = max(recipe.lengths)
    if (run.published / CONFIG).is_file():
        before = _imported(run, family)
        family, other = before.family, dict(before.other)
        if _positions(before.config) == _positions(recipe.model):  # its former context still holds
            max_tokens = max(max_tokens, before.max_tokens)
    return PublishedModel(
        family=family or family_of(recipe.model),
        config=recipe.model,
        vocab_size=vocab_size,
        max_tokens=max_tokens,
        other=other,
    )


def _positions(config: ModelConfig) -> tuple[object, ...]:
    """Return the settings that decide how far apart a model can tell positions."""
    return config.rope_base, config.rope_scaling, config.layer_pattern, config.window_tokens


def _check_vocabulary(model: PublishedModel, manifest: CheckpointManifest) -> None:
    rows = manifest.parameters["embedding.weight"].shape[0]
    if rows != model.config.padded_vocab_size(model.vocab_size):
        raise ValueError(
            f"embedding.weight: has {rows} rows, and {model.vocab_size} tokens are said; bring back config.json or "
            "tokenizer.json as they were"
        )


def _write_weights(directory: Path, model: PublishedModel, dtypes: Mapping[str, str], stored: CheckpointFiles) -> None:
    """Write the files of weights and, if there are several, their index."""
    shards = list(_shards(weights_of(model), dtypes))
    file_of, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        total += _write_shard(directory / file, shard, dtypes, stored)
        file_of |= {name: file for weight in shard for name in weight.theirs}
    if len(shards) > 1:
        write_text(directory / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": file_of}, indent=2))


def _write_shard(file: Path, shard: list[Weight], dtypes: Mapping[str, str], stored: CheckpointFiles) -> int:
    """Write one file of weights; return the bytes of its tensors."""
    weight_of = {name: weight for weight in shard for name in weight.theirs}
    # Larger types first, as `write_one_by_one` asks. The sort is stable: a weight's tensors of one type stay adjacent.
    names = sorted(weight_of, key=lambda name: -DTYPES[dtypes[name]].itemsize)
    described = {name: (dtypes[name], weight_of[name].theirs[name]) for name in names}

    def tensors() -> Iterator[Tensor]:
        read, parts = None, {}
        for name in names:
            if weight_of[name] is not read:
                read, parts = weight_of[name], {}  # before the next is read: only one is held
                parts = to_theirs(read, read_whole(stored, read.ours))
            tensor = parts.pop(name).to(DTYPES[dtypes[name]])
            if not tensor.isfinite().all():
                raise ValueError(
                    f"--dtype {dtypes[name]}: {name} has values beyond its largest; export with --dtype BF16 or F32"
                )
            yield tensor

    write_one_by_one(file, described, tensors(), metadata={"format": "pt"})
    return sum(math.prod(shape) * DTYPES[dtype].itemsize for dtype, shape in described.values())


def _shards(weights: list[Weight], dtypes: Mapping[str, str]) -> Iterator[list[Weight]]:
    """Yield the weights of each file, in order; a weight of ours is not divided between files."""
    shard: list[Weight] = []
    size = 0
    for weight in weights:
        num_bytes = sum(math.prod(shape) * DTYPES[dtypes[name]].itemsize for name, shape in weight.theirs.items())
        if shard and size + num_bytes > SHARD_BYTES:  # no shard is empty: a larger weight has its own
            yield shard
            shard, size = [], 0
        shard.append(weight)
        size += num_bytes
    yield shard


def _write_files(directory: Path, run: RunDirectory, model: PublishedModel, unchanged: bool, dtype: str) -> None:
    """Write config.json, the tokenizer's files and the generation config; `unchanged`: those that were imported.

    Without `dtype`, config.json keeps the one that it had: transformers 5 casts the weights to it.
    """
    keep_files(run.published, directory)
    if unchanged:
        return
    words = dict.fromkeys(("torch_dtype", "dtype"), _NAMES[dtype]) if dtype else {}
    changed = replace(model, other={**model.other, **words})
    write_text(directory / CONFIG, json.dumps(write_config(changed), indent=2) + "\n")
    if run.tokenizer_file.is_file():  # with the marks of knots, if the run has them
        copy_whole(run.tokenizer_file, directory / "tokenizer.json")
    if run.published.is_dir():
        return
    boundary = run.recipe().data.tokenizer.boundary
    names: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.max_tokens}
    names |= {"bos_token": boundary, "eos_token": boundary}
    write_text(directory / "tokenizer_config.json", json.dumps(names, indent=2) + "\n")
    ids = {key: model.other[key] for key in ("bos_token_id", "eos_token_id")}
    write_text(directory / "generation_config.json", json.dumps(ids, indent=2) + "\n")
