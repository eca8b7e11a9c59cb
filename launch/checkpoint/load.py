"""Loading a checkpoint on any mesh: every rank reads the ranges that its own fragments cover."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from ...parallel.fragments import held, refresh
from ...parallel.mesh import Mesh
from ...parallel.parameters import KINDS
from ...parallel.zero import DeepSpeedEngine
from ..errors import DamageError
from ..together import on_all_ranks, on_rank_0
from .files import CheckpointFiles
from .format import (
    CheckpointManifest,
    TrainState,
    complete_checkpoints,
    find_damage,
    read_checkpoint_manifest,
)
from .retention import put_checkpoint_aside
from .stored import Stored, fill


def load_last_good(
    engine: DeepSpeedEngine, directory: Path, mesh: Mesh, check: Callable[[CheckpointManifest, Path], object]
) -> tuple[Path, TrainState, list[str]] | None:
    """Load the last checkpoint that matches its checksums; return its path, its state and the damage of later ones.

    The ranks share the hashing. Once an earlier checkpoint is loaded, the damaged ones are renamed to `step-N.damaged`.
    Returns None if there is no checkpoint. Raises CommonError if any rank cannot read a file, ValueError if all
    checkpoints are damaged or one is of another version, and what `check` raises for a checkpoint from which the run
    may not continue, on any rank; nothing is renamed then. Collective.
    """
    found = on_rank_0(mesh, lambda: complete_checkpoints(directory))
    damaged: dict[Path, str] = {}
    for path in found:  # latest first
        try:
            manifest = on_all_ranks(mesh, lambda path=path: verified(path, mesh))
        except DamageError as error:
            damaged[path] = str(error)
            continue
        # Before the first weight is overwritten.
        on_all_ranks(mesh, lambda manifest=manifest, path=path: check(manifest, path))
        with CheckpointFiles(path, manifest) as stored:
            load_stored(engine, stored, mesh, updates=stored.updates)
        on_rank_0(mesh, lambda: [put_checkpoint_aside(bad) for bad in damaged])
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
    # Sorted, the list is the same on all ranks, so that every file is in exactly one share.
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
    # Collective: `on_all_ranks` raises on every rank, so none is missing here with an error of its own.
    refresh(engine, mesh, updates)
