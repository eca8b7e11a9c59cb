"""A Hugging Face directory as it is read: config.json, safetensors files, and the files that are kept as they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...data.files import sync
from ...model.families.read import PublishedModel, read_config

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
KEPT = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
)
"""Files beside the weights that `longring import` keeps."""
MAX_BYTES = 2**28
"""Largest file that is read whole or kept; tokenizers have about 10 MB."""
DTYPES = ("F32", "BF16", "F16")
"""Data types of weights that are read, in the words of safetensors."""


class ModelDirectory:
    """A Hugging Face directory; a context manager that closes its files.

    Raises ValueError if config.json is not that of a supported model, or the index of its files is not readable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = ExitStack()
        self._open: tuple[str, Any] = ("", None)
        self.model: PublishedModel = read_config(read_json(path / CONFIG))
        self._file_of = self._files_by_name()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._file_of)

    def tensor(self, name: str, shape: tuple[int, ...]) -> tuple[Tensor, str]:
        """Return a tensor and its data type in the words of safetensors.

        Raises ValueError if there is none of this name and shape, if it is of no type for weights, and if it has NaN.
        """
        if (file := self._file_of.get(name)) is None:
            raise ValueError(f"{self.path}: has no tensor {name}; name a directory with all files of the model")
        try:
            part = self._opened(file).get_slice(name)
            found, dtype = tuple(part.get_shape()), part.get_dtype()
            if found != shape or dtype not in DTYPES:
                raise ValueError(
                    f"{self.path / file}: {name} is {dtype} of shape {list(found)}, and {CONFIG} says {list(shape)} of "
                    f"{' or '.join(DTYPES)}; bring the two together"
                )
            tensor = self._opened(file).get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self.path / file}: not readable: {error}; download it again") from error
        if not tensor.isfinite().all():
            raise ValueError(f"{self.path / file}: {name} has values that are not finite; download it again")
        return tensor, dtype

    def _files_by_name(self) -> dict[str, str]:
        """Return the file of every tensor, from the index if there is one."""
        if not (self.path / INDEX).is_file():
            return dict.fromkeys(self._opened(WEIGHTS).keys(), WEIGHTS)
        found = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(found, dict) or not all(
            isinstance(file, str) and file == Path(file).name and file.endswith(".safetensors")
            for file in found.values()
        ):
            raise ValueError(f"{self.path / INDEX}: no readable index of files; download it again")
        return found

    def _opened(self, file: str) -> Any:
        """Return a file of weights; the one before is closed, so that its pages leave the memory."""
        if file == self._open[0]:
            return self._open[1]
        self._files.close()
        if not (self.path / file).is_file():
            raise ValueError(f"{self.path / file}: missing; name a directory with safetensors files")
        try:
            self._open = file, self._files.enter_context(safe_open(self.path / file, "pt"))
        except SafetensorError as error:
            raise ValueError(f"{self.path / file}: not readable: {error}; download it again") from error
        return self._open[1]


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


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield a directory beside `out`, which gets its name when all has been written without an error.

    Raises ValueError if `out` has content.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: has content; name a new directory")
    out = out.resolve()  # a name, also of "." and of a link without a target
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a command that was ended
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(partial)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    sync(out.parent)
