"""The checkpoint whose weights begin a run: found, and checked against the model and the tokenizer of the run.

A run and the one that it begins from may differ in data, lengths, RoPE, attention windows, rates, batch and ranks; the
weights, and what a token id stands for, must be the same.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ...data.files import read_patiently, sha256_of
from ...data.format.manifest import Manifest
from ...data.format.tokenizer_file import load_tokenizer
from ...model.config import ModelConfig
from ..config import Recipe
from ..identity import changes
from ..run_directory import RunDirectory
from ..settings import flat, from_tree, to_tree
from .format import (
    MANIFEST_FILE,
    CheckpointManifest,
    find_damage,
    last_good_checkpoint,
    no_good_checkpoint,
    read_checkpoint_manifest,
)

MAY_DIFFER = ("rope", "layer_pattern", "window_tokens", "z_loss", "init_std")
"""Beginnings of the keys of `model` that leave every weight its meaning."""


class Origin(NamedTuple):
    """The checkpoint whose weights begin a run."""

    checkpoint: str
    """Directory of the checkpoint."""
    sha256: str
    """SHA-256 of its manifest, which holds those of all its files."""
    step: int
    """Number of steps that it has done."""


def find_origin(recipe: Recipe, manifest: Manifest) -> Origin | None:
    """Return the checkpoint that `init.from` names, or None if the run begins from random weights.

    Files are looked at, and hashed only when they are loaded. Raises ValueError if there is no such checkpoint, or if
    model or tokenizer are not those of the run that `recipe` and `manifest`, of its data, describe; OSError if a file
    cannot be read.
    """
    if not recipe.init.from_:
        return None
    try:
        checkpoint, saved = _checkpoint_at(Path(recipe.init.from_))
        _check_model(saved, recipe, manifest)
        _check_tokenizer(checkpoint, manifest)
    except ValueError as error:
        raise ValueError(f"init.from = {recipe.init.from_}: {error}") from error
    if recipe.init.moments and not saved.state.step:
        raise ValueError("init.moments = True: imported weights have no moments; set it to false")
    return Origin(str(checkpoint), sha256_of(checkpoint / MANIFEST_FILE), saved.state.step)


def keep_published(origin: Origin, run: RunDirectory) -> None:
    """Copy the files that a published model has beside its weights to a run that goes back to it, for its exports.

    Raises OSError if they cannot be read or written.
    """
    published = RunDirectory(Path(origin.checkpoint).absolute().parent.parent).published
    if published.is_dir():
        shutil.copytree(published, run.published, dirs_exist_ok=True)


def _checkpoint_at(path: Path) -> tuple[Path, CheckpointManifest]:
    """Return the checkpoint at `path`, or the last one of the run there, and its manifest."""
    if not (path / MANIFEST_FILE).is_file():
        run = RunDirectory(path)
        if not run.recipe_file.is_file() and not run.checkpoints.is_dir():
            if (path / "config.json").is_file():
                raise ValueError(
                    f"a Hugging Face directory; run `longring import {path} OUT`, and set init.from to OUT"
                )
            raise ValueError("neither a run nor a checkpoint; name a directory that `longring train` has written")
        if (found := last_good_checkpoint(run.checkpoints)) is None:
            raise no_good_checkpoint(run.checkpoints)
        return found
    saved = read_checkpoint_manifest(path)
    if (wrong := find_damage(path, saved, hashes=False)) is not None:
        raise ValueError(f"damaged: {wrong}; name another checkpoint")
    return path, saved


def _check_model(saved: CheckpointManifest, recipe: Recipe, manifest: Manifest) -> None:
    """Raise ValueError, naming the first setting that differs, unless the weights fit the model of the recipe."""
    before = from_tree(ModelConfig, saved.state.recipe.get("model", {}), prefix="model.", source="its recipe")
    for key, (then, wanted) in changes(flat(to_tree(before)), flat(to_tree(recipe.model))).items():
        if not key.startswith(MAY_DIFFER):
            raise ValueError(
                f"has model.{key} = {then}, and this run has model.{key} = {wanted}; set model.{key} = {then}, or name "
                "a checkpoint of this model"
            )
    rows, needed = saved.parameters["embedding.weight"].shape[0], recipe.model.padded_vocab_size(manifest.vocab_size)
    if rows != needed:
        raise ValueError(
            f"has {rows} rows of embedding, and the {manifest.vocab_size} tokens of {manifest.store.name} need "
            f"{needed}; prepare the data with its tokenizer, by data.tokenizer.path"
        )


def _check_tokenizer(checkpoint: Path, manifest: Manifest) -> None:
    """Raise ValueError unless every token of the checkpoint's tokenizer has the same id in that of the data."""
    # A run keeps its tokenizer beside the directory of its checkpoints.
    file = checkpoint.absolute().parent.parent / "tokenizer.json"
    if not read_patiently(file, file.is_file):
        raise ValueError(f"has no {file}; copy tokenizer.json of the data that it was trained on to there")
    content = read_patiently(file, file.read_bytes)
    before = load_tokenizer(content, str(file)).get_vocab(with_added_tokens=True)
    now = manifest.tokenizer().tokenizer.get_vocab(with_added_tokens=True)
    if other := _first_difference(before, now):
        there = f"id {now[other]}" if other in now else "no id"
        raise ValueError(
            f"has token {other!r} with id {before[other]}, and the tokenizer of {manifest.store.name} has it with "
            f"{there}; prepare the data with data.tokenizer.path = {file}"
        )


def _first_difference(before: Mapping[str, int], now: Mapping[str, int]) -> str | None:
    """Return the token of lowest id that has another id, or none, in the vocabulary `now`; or None."""
    return min((token for token in before if now.get(token) != before[token]), key=before.__getitem__, default=None)
