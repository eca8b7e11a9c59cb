"""Loading on any mesh: every rank reads the ranges that its own fragments cover, whoever wrote them.

A parameter is a matrix of rows and columns (a vector: of one column). A tensor-parallel slice holds some rows, or some
columns, of it; a file holds ranges of the flattened slice. So what a fragment needs are rows, and of each slice that
has some of them, one range of elements.
"""

from __future__ import annotations

import logging
import math
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...parallel.fragments import Cut, Fragment, held, refresh
from ...parallel.mesh import Mesh
from ...parallel.zero import DeepSpeedEngine
from .format import (
    CheckpointManifest,
    TrainState,
    check_trained_on,
    complete_checkpoints,
    find_damage,
    put_checkpoint_aside,
    read_checkpoint_manifest,
)

log = logging.getLogger(__name__)


def load_last_good(
    engine: DeepSpeedEngine, directory: Path, mesh: Mesh, data: str
) -> tuple[Path, TrainState, list[str]] | None:
    """Load the last checkpoint that matches its own checksums -> it, its state, and what was wrong with later ones.

    The ranks share the hashing. A damaged checkpoint is put aside as `step-N.damaged`. None when there is none at all;
    ValueError when all are damaged. Collective.
    """
    [found] = _from_rank_0(complete_checkpoints(directory) if mesh.rank == 0 else None)
    damaged: list[str] = []
    for path in found:
        wrong = _problems(path, mesh)
        if not wrong:
            manifest = read_checkpoint_manifest(path)
            check_trained_on(manifest, path, data)
            load_checkpoint(engine, path, manifest, mesh)
            return path, manifest.state, damaged
        log.error("%s", wrong[0])
        damaged.append(wrong[0])
        if mesh.rank == 0:
            put_checkpoint_aside(path)
        dist.barrier()
    if damaged:
        raise ValueError(
            f"every checkpoint in {directory} is damaged: {'; '.join(damaged)}. Bring back a copy, or remove "
            f"{directory} to start from the first step"
        )
    return None


def _problems(path: Path, mesh: Mesh) -> list[str]:
    """What any rank finds wrong with a checkpoint, each having hashed its share of the files. Collective."""
    try:
        manifest = read_checkpoint_manifest(path)
        mine = find_damage(path, manifest, sorted(manifest.files)[mesh.rank :: mesh.world_size])
    except ValueError as error:
        mine = str(error)
    every: list[str | None] = [None] * mesh.world_size
    dist.all_gather_object(every, mine)
    return [text for text in every if text]


def _from_rank_0(value: Any) -> list[Any]:
    """What rank 0 has: a shared file system may show others an older directory."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values


def load_checkpoint(engine: DeepSpeedEngine, path: Path, manifest: CheckpointManifest, mesh: Mesh) -> None:
    """Read weights and moments into the engine, whatever mesh and ZeRO stage wrote them. Collective.

    Raises ValueError when the checkpoint is of another model, or lacks part of a parameter.
    """
    with ExitStack() as files:
        reader = _Reader(path, manifest, files)
        for fragment in held(engine, mesh):
            reader.fill(fragment, mesh.tensor_rank, mesh.tensor_size)
    refresh(engine, mesh, manifest.state.updates)


class _Reader:
    """Reads ranges of parameters out of one checkpoint's files."""

    def __init__(self, path: Path, manifest: CheckpointManifest, files: ExitStack) -> None:
        self._path = path
        self._manifest = manifest
        self._files = files
        self._open: dict[str, Any] = {}

    @cached_property
    def _where(self) -> dict[tuple[str, int], list[tuple[int, int, str]]]:
        """By parameter and slice: (first element, behind the last, file), in order."""
        where: dict[tuple[str, int], list[tuple[int, int, str]]] = {}
        for name, entry in self._manifest.files.items():
            for parameter, (start, numel) in entry.ranges.items():
                where.setdefault((parameter, entry.slice), []).append((start, start + numel, name))
        return {key: sorted(ranges) for key, ranges in where.items()}

    def fill(self, fragment: Fragment, tensor_rank: int, tensor_size: int) -> None:
        """Copy all kinds of a fragment into its views."""
        parameter = fragment.parameter
        entry = self._manifest.parameters.get(parameter.name)
        if entry is None or entry.shape != parameter.shape:
            raise ValueError(
                f"checkpoint {self._path} is of another model: {parameter.name} has shape {list(parameter.shape)} here "
                f"and {list(entry.shape) if entry else 'none'} there"
            )
        rows, columns = _indices(parameter.shape, parameter.cut, tensor_rank, tensor_size)
        first, last = fragment.start // len(columns), -(-(fragment.start + fragment.numel) // len(columns))
        saved_cut, saved_size = entry.cut and Cut(*entry.cut), self._manifest.state.tensor
        inside = fragment.start - first * len(columns)
        for kind, view in fragment.tensors.items():
            block = torch.full((last - first, len(columns)), math.nan)
            num_read = 0
            for number in range(saved_size if saved_cut else 1):
                theirs = _indices(parameter.shape, saved_cut, number, saved_size)
                # positions in what is needed, and in the slice, of the rows and columns that both have
                _, ours_r, theirs_r = np.intersect1d(rows[first:last], theirs[0], True, return_indices=True)
                _, ours_c, theirs_c = np.intersect1d(columns, theirs[1], True, return_indices=True)
                if not len(ours_r) or not len(ours_c):
                    continue
                begin, end = int(theirs_r.min()), int(theirs_r.max()) + 1
                width = len(theirs[1])
                there = self._range(parameter.name, kind, number, begin * width, end * width).view(-1, width)
                block[np.ix_(ours_r, ours_c)] = there[np.ix_(theirs_r - begin, theirs_c)]
                num_read += len(ours_r) * len(ours_c)
            assert num_read == block.numel(), "the slices make the whole parameter"
            view.copy_(block.view(-1)[inside : inside + fragment.numel])

    def _range(self, name: str, kind: str, slice_number: int, begin: int, end: int) -> Tensor:
        """Elements [begin, end) of a flattened slice, from all files that have some of them."""
        result = torch.empty(end - begin)
        at = begin
        for start, stop, file in self._where.get((name, slice_number), []):
            if start > at or at == end:
                break
            if stop > at:
                upto, stored = min(stop, end), self._opened(file).get_slice(f"{name}/{kind}")
                result[at - begin : upto - begin] = stored[at - start : upto - start]
                at = upto
        if at < end:
            raise ValueError(f"checkpoint {self._path} lacks elements {at:,} to {end:,} of {name}/{kind}")
        return result

    def _opened(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = self._files.enter_context(safe_open(self._path / file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self._path / file} is no safetensors file: {error}") from error
        return self._open[file]


def _indices(
    shape: tuple[int, ...], cut: Cut | None, tensor_rank: int, tensor_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which rows and columns of the whole parameter a tensor-parallel slice holds, in the slice's own order."""
    sizes = [shape[0], math.prod(shape[1:])]
    indices = [np.arange(size) for size in sizes]
    if cut is not None:
        chunks = indices[cut.dim].reshape(cut.stride, tensor_size, -1)
        indices[cut.dim] = chunks[:, tensor_rank].reshape(-1)
    return indices[0], indices[1]
