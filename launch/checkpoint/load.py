"""Loading a checkpoint on any mesh: every rank reads the ranges that its own fragments cover.

A parameter is treated as a matrix (a vector as one column). A tensor-parallel slice holds some rows or some columns of
the matrix, and a file holds ranges of the flattened slice. A fragment covers rows of its own slice, so it needs one
range of elements from every stored slice that has some of these rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...data.files import sha256_of
from ...parallel.fragments import KINDS, Cut, Fragment, Parameter, held, refresh
from ...parallel.mesh import Mesh
from ...parallel.zero import DeepSpeedEngine
from ..errors import DamageError
from ..together import from_rank_0, on_all_ranks
from .format import (
    MANIFEST_FILE,
    CheckpointManifest,
    TrainState,
    complete_checkpoints,
    find_damage,
    read_checkpoint_manifest,
)
from .retention import put_checkpoint_aside
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
            manifest = on_all_ranks(mesh, lambda path=path: _verified(path, mesh))
        except DamageError as error:
            damaged[path] = str(error)
            continue
        on_all_ranks(mesh, lambda manifest=manifest, path=path: check(manifest, path))
        load_checkpoint(engine, path, manifest, mesh)
        on_all_ranks(mesh, lambda: [put_checkpoint_aside(bad) for bad in damaged] if mesh.rank == 0 else [])
        return path, manifest.state, list(damaged.values())
    if damaged:
        raise ValueError(
            f"checkpoints {directory}: all are damaged: {'; '.join(damaged.values())}; bring back a copy, or name "
            "another run_directory to start from the first step"
        )
    return None


def load_origin(engine: DeepSpeedEngine, path: Path, sha256: str, mesh: Mesh, *, moments: bool) -> None:
    """Load the weights of a checkpoint of another run and, with `moments`, AdamW's moments and number of updates.

    The ranks share the hashing. Raises ValueError on any rank if a file is damaged or the manifest has another SHA-256
    than `sha256`, and CommonError if it cannot be read. Collective.
    """

    def verified() -> CheckpointManifest:
        if (found := sha256_of(path / MANIFEST_FILE)) != sha256:
            raise ValueError(
                f"{path / MANIFEST_FILE}: has SHA-256 {found[:16]}..., and had {sha256[:16]}... when this start began; "
                "mount the same directory on all machines, and start again"
            )
        try:
            return _verified(path, mesh)
        except DamageError as error:
            raise ValueError(f"init.from: damaged: {error}; name another checkpoint") from error

    manifest = on_all_ranks(mesh, verified)
    load_checkpoint(engine, path, manifest, mesh, KINDS if moments else KINDS[:1])


def _verified(path: Path, mesh: Mesh) -> CheckpointManifest:
    """Return the manifest of a checkpoint after hashing this rank's share of the files."""
    manifest = read_checkpoint_manifest(path)
    wrong = find_damage(path, manifest, sorted(manifest.files)[mesh.rank :: mesh.world_size])
    if wrong is not None:
        raise DamageError(wrong)
    return manifest


def load_checkpoint(
    engine: DeepSpeedEngine,
    path: Path,
    manifest: CheckpointManifest,
    mesh: Mesh,
    kinds: Collection[str] = KINDS,
) -> None:
    """Read tensors of these kinds, written on any mesh and ZeRO stage, into the engine. Collective.

    Without moments, AdamW begins anew.
    Raises ValueError if the checkpoint is of another model or lacks part of a parameter, and CommonError if any rank
    cannot read a file.
    """

    def fill() -> None:
        with ExitStack() as files:
            reader = _Reader(path, manifest, files)
            for fragment in held(engine, mesh):
                reader.fill(fragment, kinds, mesh.tensor_rank, mesh.tensor_size)

    on_all_ranks(mesh, fill)
    refresh(engine, mesh, manifest.state.updates if set(KINDS) <= set(kinds) else 0)


@contextmanager
def whole_weights(path: Path, manifest: CheckpointManifest) -> Iterator[Callable[[str], Tensor]]:
    """Yield a function from a parameter's name to its whole weight, fp32, of a checkpoint of any mesh."""
    with ExitStack() as files:
        reader = _Reader(path, manifest, files)

        def read(name: str) -> Tensor:
            shape = manifest.parameters[name].shape
            weight = torch.empty(shape)
            reader.fill(Fragment(Parameter(name, shape, None), 0, {"weight": weight.view(-1)}), KINDS[:1], 0, 1)
            return weight

        yield read


class _Reader:
    """A reader of parameter ranges from the files of one checkpoint."""

    def __init__(self, path: Path, manifest: CheckpointManifest, files: ExitStack) -> None:
        self._path = path
        self._manifest = manifest
        self._files = files
        self._open: dict[str, TensorFile] = {}

    @cached_property
    def _stored_ranges(self) -> dict[tuple[str, int], list[tuple[int, int, str]]]:
        """[start, stop) and file of every stored range, sorted, by parameter and slice."""
        found: dict[tuple[str, int], list[tuple[int, int, str]]] = {}
        for name, entry in self._manifest.files.items():
            for parameter, (start, numel) in entry.ranges.items():
                found.setdefault((parameter, entry.slice), []).append((start, start + numel, name))
        return {key: sorted(ranges) for key, ranges in found.items()}

    def fill(self, fragment: Fragment, kinds: Collection[str], tensor_rank: int, tensor_size: int) -> None:
        """Copy the tensors of these kinds of a fragment into its views.

        Raises ValueError if the checkpoint has no parameter of this name and shape, or lacks part of it.
        """
        parameter = fragment.parameter
        entry = self._manifest.parameters.get(parameter.name)
        if entry is None or entry.shape != parameter.shape:
            raise ValueError(
                f"checkpoint {self._path}: is of another model: {parameter.name} has shape "
                f"{list(entry.shape) if entry else 'none'} there and {list(parameter.shape)} here; bring back the old "
                "`model` settings, or name another run_directory"
            )
        rows, columns = _indices(parameter.shape, parameter.cut, tensor_rank, tensor_size)
        # The fragment lies in rows [first, last) of this rank's slice; it may begin and end within a row.
        first, last = fragment.start // len(columns), -(-(fragment.start + fragment.numel) // len(columns))
        # The mesh that saved may have cut the parameter along another dim, or into another number of slices.
        saved_cut, saved_size = entry.cut and Cut(*entry.cut), self._manifest.state.tensor
        inside = fragment.start - first * len(columns)
        for kind in kinds:
            view = fragment.tensors[kind]
            needed = torch.full((last - first, len(columns)), math.nan)  # [rows, columns]
            # Invariant: `num_read` elements of `needed` have been read, each from the one slice that has it.
            num_read = 0
            for number in range(saved_size if saved_cut else 1):
                theirs = _indices(parameter.shape, saved_cut, number, saved_size)
                # Indices into `needed` and into the stored slice of the rows and columns that both have.
                _, ours_r, theirs_r = np.intersect1d(rows[first:last], theirs[0], True, return_indices=True)
                _, ours_c, theirs_c = np.intersect1d(columns, theirs[1], True, return_indices=True)
                if not len(ours_r) or not len(ours_c):
                    continue
                # One range spans all these rows; rows between them that are not needed are read along.
                begin, end = int(theirs_r.min()), int(theirs_r.max()) + 1
                width = len(theirs[1])
                there = self._range(parameter.name, kind, number, begin * width, end * width)
                there = there.view(-1, width)  # [rows begin to end, columns of the slice]
                needed[np.ix_(ours_r, ours_c)] = there[np.ix_(theirs_r - begin, theirs_c)]
                num_read += len(ours_r) * len(ours_c)
            assert num_read == needed.numel(), "the slices make up the whole parameter"
            view.copy_(needed.view(-1)[inside : inside + fragment.numel])

    def _range(self, name: str, kind: str, slice_number: int, begin: int, end: int) -> Tensor:
        """Return elements [begin, end) of a flattened slice, fp32 [end - begin], from the files that hold them."""
        result = torch.empty(end - begin)
        # Ranges are sorted, so everything before `at` is read when a range is looked at.
        at = begin
        for start, stop, file in self._stored_ranges.get((name, slice_number), []):
            if start > at or at == end:
                break
            if stop > at:
                upto = min(stop, end)
                self._read(file, result[at - begin : upto - begin], f"{name}/{kind}", at - start)
                at = upto
        if at < end:
            raise ValueError(
                f"checkpoint {self._path}: lacks elements {at:,} to {end:,} of {name}/{kind}; remove it to resume from "
                "the checkpoint before"
            )
        return result

    def _read(self, file: str, result: Tensor, tensor: str, first: int) -> None:
        """Read the elements of a tensor from `first` on into `result`, from a file that stays open."""
        try:
            if file not in self._open:
                self._open[file] = TensorFile(self._path / file)
                self._files.callback(self._open[file].close)
            self._open[file].read_into(result, tensor, first)
        except ValueError as error:
            raise ValueError(
                f"{self._path / file}: not a safetensors file: {error}; remove {self._path} to resume from the "
                "checkpoint before"
            ) from error


def _indices(
    shape: tuple[int, ...], cut: Cut | None, tensor_rank: int, tensor_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows and the columns of the whole parameter that a slice holds, each in the order of the slice."""
    sizes = [shape[0], math.prod(shape[1:])]
    indices = [np.arange(size) for size in sizes]
    if cut is not None:
        # A fused weight has `stride` parts, such as gate and up, and every rank holds its share of each.
        parts = indices[cut.dim].reshape(cut.stride, tensor_size, -1)  # [stride, rank, index]
        indices[cut.dim] = parts[:, tensor_rank].reshape(-1)
    return indices[0], indices[1]
