"""The files of a checkpoint, and `Checkpoint`, by which any program reads one: no rank, mesh or optimizer is needed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

from torch import Tensor

from ...data.files import read_patiently
from ..errors import DamageError
from .format import (
    MANIFEST_FILE,
    CheckpointManifest,
    ParameterEntry,
    find_damage,
    last_good_checkpoint,
    no_good_checkpoint,
    read_checkpoint_manifest,
)
from .stored import read_whole
from .tensors import TensorFile


class CheckpointFiles:
    """The parameters of a checkpoint, `Stored`; a context manager that closes its files."""

    def __init__(self, path: Path, manifest: CheckpointManifest) -> None:
        self.name = f"checkpoint {path}"
        self.parameters: Mapping[str, ParameterEntry] = manifest.parameters
        self.tensor = manifest.state.tensor
        self.updates = manifest.state.updates
        self._path = path
        self._manifest = manifest
        self._open: dict[str, TensorFile] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()

    @cached_property
    def _stored_ranges(self) -> dict[tuple[str, int], list[tuple[int, int, str]]]:
        """[start, stop) and file of every stored range, sorted, by parameter and slice."""
        found: dict[tuple[str, int], list[tuple[int, int, str]]] = {}
        for name, entry in self._manifest.files.items():
            for parameter, (start, numel) in entry.ranges.items():
                found.setdefault((parameter, entry.slice), []).append((start, start + numel, name))
        return {key: sorted(ranges) for key, ranges in found.items()}

    def read(self, result: Tensor, parameter: str, kind: str, slice_number: int, first: int) -> None:
        """Read elements of a flattened slice into `result` [numel] from the files that hold them, as `Stored` says.

        Raises ValueError if the files do not have all of them.
        """
        # Ranges are sorted, so everything before `at` is read when a range is looked at.
        at, end = first, first + result.numel()
        for start, stop, file in self._stored_ranges.get((parameter, slice_number), []):
            if start > at or at == end:  # a gap, or all is read
                break
            if stop > at:  # else it ends before the first element that is wanted
                upto = min(stop, end)
                self._read(file, result[at - first : upto - first], f"{parameter}/{kind}", at - start)
                at = upto
        if at < end:
            raise ValueError(
                f"{self.name}: lacks elements {at:,} to {end:,} of {parameter}/{kind}; remove it to resume from the "
                "checkpoint before"
            )

    def _read(self, file: str, result: Tensor, tensor: str, first: int) -> None:
        """Read the elements of a tensor from `first` on into `result`, from a file that stays open."""
        try:
            if file not in self._open:
                self._open[file] = TensorFile(self._path / file)
            self._open[file].read_into(result, tensor, first)
        except ValueError as error:
            raise ValueError(
                f"{self._path / file}: not a safetensors file: {error}; remove {self._path} to resume from the "
                "checkpoint before"
            ) from error


class Checkpoint:
    """A checkpoint of a run or of `longring import`, read by one process, whatever the ranks that wrote it.

    `path` is its directory, `step-N`, or the directory of a run or import, of which the last good one is taken. Names
    and shapes are those of LongRing's model; `longring export` writes those of transformers. Raises ValueError if there
    is no good checkpoint or it is of another version, DamageError (a ValueError) if its manifest is damaged, and
    OSError if it cannot be read.
    """

    def __init__(self, path: Path | str) -> None:
        path = Path(path)
        checkpoints = path / "checkpoints"
        if read_patiently(path, (path / MANIFEST_FILE).is_file):
            self.path, self._manifest = path, read_checkpoint_manifest(path)
        elif (found := last_good_checkpoint(checkpoints)) is not None:
            self.path, self._manifest = found
        else:
            raise no_good_checkpoint(checkpoints)

    @property
    def step(self) -> int:
        """Number of steps done; 0 for imported weights."""
        return self._manifest.state.step

    @property
    def recipe(self) -> Mapping[str, object]:
        """Resolved recipe of the start that wrote it, as nested tables."""
        return self._manifest.state.recipe

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, by name."""
        return {name: entry.shape for name, entry in self._manifest.parameters.items()}

    def read(self, name: str, kind: Literal["weight", "exp_avg", "exp_avg_sq"] = "weight") -> Tensor:
        """Return a parameter in fp32, or the first or second moment that AdamW has of it, whole and on the host.

        It has the shape of `shapes[name]`. Hashes are not compared (`verify`). Raises KeyError if there is no such
        parameter, ValueError if a part of it is missing, and OSError if a file cannot be read.
        """
        with CheckpointFiles(self.path, self._manifest) as stored:
            return read_whole(stored, name, kind)

    def verify(self) -> None:
        """Hash all files. Raises DamageError if one is damaged or missing, and OSError if one cannot be read."""
        wrong = find_damage(self.path, self._manifest)
        if wrong is not None:
            raise DamageError(wrong)
