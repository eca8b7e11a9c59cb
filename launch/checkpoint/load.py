"""Loading a checkpoint on any mesh: every rank reads the ranges that its own fragments cover."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Self

from torch import Tensor

from ...parallel.fragments import KINDS, held, refresh
from ...parallel.mesh import Mesh
from ...parallel.zero import DeepSpeedEngine
from ..errors import DamageError
from ..together import from_rank_0, on_all_ranks
from .format import (
    CheckpointManifest,
    ParameterEntry,
    TrainState,
    complete_checkpoints,
    find_damage,
    read_checkpoint_manifest,
)
from .retention import put_checkpoint_aside
from .stored import Stored, fill
from .tensors import TensorFile


def load_last_good(
    engine: DeepSpeedEngine, directory: Path, mesh: Mesh, check: Callable[[CheckpointManifest, Path], object]
) -> tuple[Path, TrainState, list[str]] | None:
    """Load the last checkpoint that matches its checksums; return its path, its state and the damage of later ones.

    The ranks share the hashing. Once an earlier checkpoint is loaded, the damaged ones are renamed to `step-N.damaged`.
    Returns None if there is no checkpoint. Raises CommonError if any rank cannot read a file, ValueError if all
    checkpoints are damaged or one is of another version, and what `check` raises for a checkpoint from which the run
    may not continue, on any rank; nothing is renamed then. Collective.
    """
    found = from_rank_0(on_all_ranks(mesh, lambda: complete_checkpoints(directory) if mesh.rank == 0 else []))
    damaged: dict[Path, str] = {}
    for path in found:  # latest first
        try:
            manifest = on_all_ranks(mesh, lambda path=path: verified(path, mesh))
        except DamageError as error:
            damaged[path] = str(error)
            continue
        on_all_ranks(mesh, lambda manifest=manifest, path=path: check(manifest, path))
        with CheckpointFiles(path, manifest) as stored:
            load_stored(engine, stored, mesh, updates=stored.updates)
        on_all_ranks(mesh, lambda: [put_checkpoint_aside(bad) for bad in damaged] if mesh.rank == 0 else [])
        return path, manifest.state, list(damaged.values())
    if damaged:
        raise ValueError(
            f"checkpoints {directory}: all are damaged: {'; '.join(damaged.values())}; bring back a copy, or name "
            "another run_directory to start from the first step"
        )
    return None


def verified(path: Path, mesh: Mesh) -> CheckpointManifest:
    """Return the manifest of a checkpoint after hashing this rank's share of the files.

    Raises DamageError if one of them, or the manifest, is damaged, and OSError if it cannot be read.
    """
    manifest = read_checkpoint_manifest(path)
    wrong = find_damage(path, manifest, sorted(manifest.files)[mesh.rank :: mesh.world_size])
    if wrong is not None:
        raise DamageError(wrong)
    return manifest


def load_stored(
    engine: DeepSpeedEngine, stored: Stored, mesh: Mesh, *, kinds: Collection[str] = KINDS, updates: int = 0
) -> None:
    """Read tensors of these kinds, divided in any way, into the engine, and set AdamW's number of updates. Collective.

    Raises ValueError if they are of another model or part of a parameter is missing, and CommonError if any rank cannot
    read a file.
    """

    def fill_all() -> None:
        for fragment in held(engine, mesh):
            fill(stored, fragment, kinds, mesh.tensor_rank, mesh.tensor_size)

    on_all_ranks(mesh, fill_all)
    refresh(engine, mesh, updates)


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
        """Read elements of a flattened slice from the files that hold them, as `Stored` says."""
        # Ranges are sorted, so everything before `at` is read when a range is looked at.
        at, end = first, first + result.numel()
        for start, stop, file in self._stored_ranges.get((parameter, slice_number), []):
            if start > at or at == end:
                break
            if stop > at:
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
