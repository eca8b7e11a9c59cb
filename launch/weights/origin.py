"""The weights that begin a run: found, and checked against the model and the tokenizer of the run.

They are those of a run, of one of its checkpoints, of an import, or of a Hugging Face directory. A run and the one that
it begins from may differ in data, lengths, RoPE, attention windows, rates, batch and ranks; the weights, and what a
token id stands for, must be the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ...data.files import copy_whole, read_patiently, sha256_of
from ...data.format.manifest import Manifest
from ...data.format.tokenizer_file import load_tokenizer
from ...model.config import ModelConfig
from ..checkpoint.format import (
    MANIFEST_FILE,
    CheckpointManifest,
    find_damage,
    last_good_checkpoint,
    no_good_checkpoint,
    read_checkpoint_manifest,
)
from ..config import Recipe
from ..identity import changes
from ..run_directory import RunDirectory
from ..settings import flat, from_tree, to_tree
from .directory import CONFIG, ModelDirectory, keep_files

MAY_DIFFER = ("rope", "layer_pattern", "window_tokens", "z_loss", "init_std")
"""Beginnings of the keys of `model` that leave every weight its meaning."""
SETTABLE = (
    *("evaluate.", "faults.", "loader.", "parallel.", "train.dtype", "train.attention_backend"),
    *(f"model.{key}" for key in MAY_DIFFER),
)
"""Beginnings of the settings of an evaluation of weights on other data."""


class Origin(NamedTuple):
    """The weights that begin a run, as ranks compare and records keep them."""

    checkpoint: str
    """Directory of the checkpoint, or of a Hugging Face model."""
    sha256: str
    """SHA-256 of the checkpoint's manifest, which holds those of all its files, or `ModelDirectory.sha256`."""
    step: int
    """Number of steps that they have been trained here; 0 for a published model."""


@dataclass(frozen=True)
class Weights:
    """Weights on disk that a run can begin with, and the model and tokenizer that they belong to."""

    origin: Origin
    config: ModelConfig
    num_rows: int
    """Rows of the embedding, padding included."""
    tokenizer_file: Path
    """tokenizer.json of their data, which may be missing."""
    saved: CheckpointManifest | None
    """Manifest of the checkpoint; None for a Hugging Face directory."""

    def check_tokens(self, manifest: Manifest) -> None:
        """Raise ValueError unless the embedding has a row for each token of prepared data, under the same id."""
        advice = f"prepare the data with data.tokenizer.path = {self.tokenizer_file}"
        needed = self.config.padded_vocab_size(manifest.vocab_size)
        if self.num_rows != needed:
            raise ValueError(
                f"has {self.num_rows} rows of embedding, and the {manifest.vocab_size} tokens of {manifest.store.name} "
                f"need {needed}; {advice}"
            )
        file = self.tokenizer_file
        if not read_patiently(file, file.is_file):
            raise ValueError(f"has no {file}; copy tokenizer.json of the data that it was trained on to there")
        content = read_patiently(file, file.read_bytes)
        before = load_tokenizer(content, str(file)).get_vocab(with_added_tokens=True)
        now = manifest.tokenizer().tokenizer.get_vocab(with_added_tokens=True)
        if other := _first_difference(before, now):
            there = f"id {now[other]}" if other in now else "no id"
            raise ValueError(
                f"has token {other!r} with id {before[other]}, and the tokenizer of {manifest.store.name} has it with "
                f"{there}; {advice}"
            )


def find_origin(recipe: Recipe, manifest: Manifest) -> Origin | None:
    """Return the weights that `init.from` names, or None if the run begins from random weights.

    Files are not hashed here but when they are loaded. Raises ValueError if there are no such weights, or if
    model or tokenizer are not those of the run that `recipe` and `manifest`, of its data, describe; OSError if a file
    cannot be read.
    """
    if not recipe.init.from_:
        return None
    try:
        found = weights_at(Path(recipe.init.from_))
        _check_model(found.config, recipe.model)
        found.check_tokens(manifest)
    except ValueError as error:
        raise ValueError(f"init.from = {recipe.init.from_}: {error}") from error
    if recipe.init.moments and not found.origin.step:  # step 0: an import or a Hugging Face model
        raise ValueError("init.moments = True: imported weights have no moments; set it to false")
    return found.origin


def weights_at(path: Path) -> Weights:
    """Return the weights of a checkpoint, of a run or an import (the last checkpoint), or of a Hugging Face directory.

    Raises ValueError if there are none at `path` or they are damaged, and OSError if a file cannot be read.
    """
    if (path / MANIFEST_FILE).is_file():
        saved = read_checkpoint_manifest(path)
        if (wrong := find_damage(path, saved, hashes=False)) is not None:
            raise ValueError(f"damaged: {wrong}; name another checkpoint")
        return _of_checkpoint(path, saved)
    run = RunDirectory(path)
    if run.recipe_file.is_file() or run.checkpoints.is_dir():
        if (found := last_good_checkpoint(run.checkpoints)) is None:
            raise no_good_checkpoint(run.checkpoints)
        return _of_checkpoint(*found)
    if not (path / CONFIG).is_file():
        raise ValueError(
            "neither a run, a checkpoint nor a Hugging Face model; name a directory that `longring train` has written, "
            f"or one with {CONFIG}"
        )
    with ModelDirectory(path) as directory:
        origin, config = Origin(str(path), directory.sha256, 0), directory.config
    rows = config.padded_vocab_size(config.vocab_size)
    return Weights(origin, config, rows, path / "tokenizer.json", None)


def _of_checkpoint(path: Path, saved: CheckpointManifest) -> Weights:
    config = from_tree(ModelConfig, saved.state.recipe.get("model", {}), prefix="model.", source="its recipe")
    origin = Origin(str(path), sha256_of(path / MANIFEST_FILE), saved.state.step)
    rows = saved.parameters["embedding.weight"].shape[0]
    # A run keeps its tokenizer beside the directory of its checkpoints.
    return Weights(origin, config, rows, _run_of(path).tokenizer_file, saved)


def keep_published(origin: Origin, run: RunDirectory) -> None:
    """Copy the files that a published model has beside its weights to a run that goes back to it, for its exports.

    Raises OSError if they cannot be read or written.
    """
    path = Path(origin.checkpoint)
    published = _run_of(path).published
    if not (path / MANIFEST_FILE).is_file():
        keep_files(path, run.published)
    elif published.is_dir():
        for file in published.iterdir():
            copy_whole(file, run.published / file.name)


def _run_of(checkpoint: Path) -> RunDirectory:
    """Return the run of a checkpoint."""
    return RunDirectory(checkpoint.absolute().parent.parent)  # RUN/checkpoints/step-N


def _check_model(before: ModelConfig, wanted: ModelConfig) -> None:
    """Raise ValueError, naming the first setting that differs, unless weights of one model fit the other."""
    for key, (then, now) in changes(flat(to_tree(before)), flat(to_tree(wanted))).items():
        if not key.startswith(MAY_DIFFER):
            raise ValueError(
                f"has model.{key} = {then}, and this run has model.{key} = {now}; set model.{key} = {then}, or name "
                "a checkpoint of this model"
            )


def _first_difference(before: Mapping[str, int], now: Mapping[str, int]) -> str | None:
    """Return the token of lowest id that has another id, or none, in the vocabulary `now`; or None."""
    return min((token for token in before if now.get(token) != before[token]), key=before.__getitem__, default=None)


def check_settable(overrides: Sequence[str]) -> None:
    """Raise ValueError unless an evaluation of weights on other data takes these settings."""
    for override in overrides:
        if not override.startswith(SETTABLE):
            raise ValueError(
                f"override {override!r}: with --data it has no effect, or changes what the weights are; leave it out, "
                f"or set one of {', '.join(f'{key}*' for key in SETTABLE)}"
            )
