"""A Hugging Face directory as it is read: config.json, safetensors files, and the files that are kept as they are."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ...data.files import copy_whole, sha256_of_json
from ...model.config import ModelConfig
from ...model.families.read import PublishedModel, read_config
from ...model.families.weights import Rows, Weight, weights_of
from ..checkpoint.format import ParameterEntry
from ..checkpoint.tensors import DTYPES, TensorFile
from ..settings import from_tree, to_tree

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
KEPT = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
)
"""Files beside the weights that a run keeps."""
MAX_BYTES = 2**28
"""Largest file that is read whole; tokenizers have about 10 MB."""

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class ModelDirectory:
    """The weights of a Hugging Face directory as parameters of LongRing, `Stored`; a context manager that closes files.

    Raises ValueError if config.json is not that of a supported model, or the headers of its files do not describe the
    weights of that model.
    """

    tensor: int = 1

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self._open: dict[str, TensorFile] = {}
        tree = read_json(path / CONFIG)
        self.model: PublishedModel = read_config(tree)
        self.weights: Mapping[str, Weight] = {weight.ours: weight for weight in weights_of(self.model)}
        self.parameters: Mapping[str, ParameterEntry] = {
            name: ParameterEntry(shape=weight.shape, cut=None) for name, weight in self.weights.items()
        }
        # Rows of ours before each of `rows`, and their number.
        self._starts = {
            name: [0, *accumulate(rows.number for rows in weight.rows)] for name, weight in self.weights.items()
        }
        self._file_of = self._files_by_name()
        self._check_tensors()
        # `_check_tensors` has opened every file with a weight.
        headers = {file: opened.tensors for file, opened in self._open.items()}
        self.sha256 = sha256_of_json({CONFIG: tree, "files": headers})
        """SHA-256 of config.json and of the names, types and positions of all tensors; their values are not hashed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()

    @property
    def config(self) -> ModelConfig:
        """Settings of the model with its number of tokens."""
        tree = {**to_tree(self.model.config), "vocab_size": self.model.vocab_size}
        return from_tree(ModelConfig, tree, prefix="model.", source=str(self.path / CONFIG))

    @property
    def dtypes(self) -> dict[str, str]:
        """Data types of all weights in the words of safetensors, by the names of transformers."""
        return {
            name: self._open[self._file_of[name]].tensors[name].dtype
            for weight in self.weights.values()
            for name in weight.theirs
        }

    def read(self, result: Tensor, parameter: str, kind: str, slice_number: int, first: int) -> None:
        """Read elements of a parameter from `first` on, as `Stored` says; there are only weights, each in one slice."""
        assert kind == "weight" and slice_number == 0
        weight, starts = self.weights[parameter], self._starts[parameter]
        width = math.prod(weight.shape[1:])  # elements of a row
        # Elements of the parameter from `at` on are still to be read; each round reads those of one of `weight.rows`.
        at, stop = first, first + result.numel()
        while at < stop:
            number = bisect_right(starts, at // width) - 1
            end = min(stop, starts[number + 1] * width)
            self._read_rows(result[at - first : end - first], weight.rows[number], at - starts[number] * width, width)
            at = end

    def _read_rows(self, result: Tensor, rows: Rows, first: int, width: int) -> None:
        """Read the elements of these rows from `first` on."""
        if not rows.name:
            result.zero_()  # padding
            return
        first += rows.first * width
        self._read_tensor(result, rows.name, first)
        if rows.name == _EMBEDDING and self.model.config.tied_head and _HEAD in self._file_of:
            head = torch.empty_like(result)
            self._read_tensor(head, _HEAD, first)
            if not head.equal(result):  # transformers 5 would not tie it
                raise ValueError(
                    f"{self.path}: {_HEAD} differs from {_EMBEDDING}, and tie_word_embeddings of {CONFIG} says that "
                    "they are one; set it to false"
                )

    def _read_tensor(self, result: Tensor, name: str, first: int) -> None:
        file = self._file_of[name]
        self._opened(file).read_into(result, name, first)
        if not result.isfinite().all():
            raise ValueError(f"{self.path / file}: {name} has values that are not finite; download it again")

    def _check_tensors(self) -> None:
        """Raise ValueError unless the files have all weights, of the right shapes and types, and no others."""
        shapes = {name: shape for weight in self.weights.values() for name, shape in weight.theirs.items()}
        if self.model.config.tied_head and _HEAD in self._file_of:
            shapes[_HEAD] = shapes[_EMBEDDING]  # a second copy, which `_read_rows` compares
        for name, shape in shapes.items():
            if (file := self._file_of.get(name)) is None or name not in self._opened(file).tensors:
                raise ValueError(f"{self.path}: has no tensor {name}; name a directory with all files of the model")
            found = self._opened(file).tensors[name]
            if found.shape != shape or found.dtype not in DTYPES:
                raise ValueError(
                    f"{self.path / file}: {name} is {found.dtype:.80} of shape {list(found.shape)}, and {CONFIG} says "
                    f"{list(shape)} of {' or '.join(DTYPES)}; bring the two together"
                )
        # Some files have buffers beside the weights.
        buffers = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq" for n in range(self.model.config.num_layers)}
        if extra := self._file_of.keys() - shapes - buffers:
            raise ValueError(
                f"{self.path}: has a tensor {min(extra)}, which {CONFIG} does not explain; import another model"
            )
        # transformers takes a tensor from the last file that has it, whatever the index says.
        for file, opened in self._open.items():
            if extra := {name for name in opened.tensors if self._file_of.get(name) != file} - buffers:
                raise ValueError(
                    f"{self.path / file}: has a tensor {min(extra)}, which {INDEX} does not place there; download both "
                    "again"
                )

    def _files_by_name(self) -> dict[str, str]:
        """Return the file of every tensor; transformers takes a single file too, if there is an index beside it."""
        if (self.path / WEIGHTS).is_file() or not (self.path / INDEX).is_file():
            return dict.fromkeys(self._opened(WEIGHTS).tensors, WEIGHTS)
        found = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(found, dict) or not all(
            # Names alone, so that an index leads to no other directory.
            isinstance(file, str) and file == Path(file).name and file.endswith(".safetensors")
            for file in found.values()
        ):
            raise ValueError(f"{self.path / INDEX}: no readable index of files; download it again")
        return found

    def _opened(self, name: str) -> TensorFile:
        """Return a file of weights, which stays open."""
        if name not in self._open:
            file = self.path / name
            if not file.is_file():
                raise ValueError(f"{file}: missing; name a directory with safetensors files")
            try:
                self._open[name] = TensorFile(file)
            except ValueError as error:
                raise ValueError(f"{file}: not readable: {error}; download it again") from error
        return self._open[name]


def keep_files(source: Path, target: Path) -> None:
    """Copy the files beside the weights of a Hugging Face directory, and nothing else of it, to the directory `target`.

    Raises OSError if they cannot be read or written.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        if (source / name).is_file():
            copy_whole(source / name, target / name)


def read_json(file: Path) -> dict[str, Any]:
    """Return the table of a JSON file. Raises ValueError if it is missing, too large or holds anything else."""
    if not file.is_file() or file.stat().st_size > MAX_BYTES:
        raise ValueError(
            f"{file}: missing, or larger than {MAX_BYTES} bytes; name the directory of a Hugging Face model"
        )
    try:
        tree = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON: {error}; download it again") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{file}: holds no table; download it again")
    return tree
