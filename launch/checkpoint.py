"""Checkpoints: written aside, made visible by one rename when every rank is done."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:  # importing DeepSpeed takes seconds, and a plan only reads what a checkpoint says of itself
    from ..parallel.mesh import Mesh
    from ..parallel.zero import DeepSpeedEngine

_STATE_FILE = "longring.json"
_PARTIAL = ".partial"


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything beside weights and moments that a run needs to go on: the order of data follows from the step."""

    step: int
    """Steps done."""
    world_size: int
    """Ranks that wrote it."""
    data: str
    """SHA-256 of the prepared data's manifest."""


def save(engine: DeepSpeedEngine, directory: Path, state: TrainState, mesh: Mesh) -> Path:
    """Write a checkpoint and return its directory. Collective; a crash at any point leaves the earlier ones good."""
    final = directory / f"step-{state.step:08d}"
    partial = final.with_name(final.name + _PARTIAL)
    if mesh.rank == 0 and partial.exists():
        shutil.rmtree(partial)
    dist.barrier()
    engine.save_checkpoint(str(directory), tag=partial.name, save_latest=False)
    dist.barrier()
    if mesh.rank == 0:
        (partial / _STATE_FILE).write_text(json.dumps(asdict(state)) + "\n")
        _sync(partial)
        partial.rename(final)
    dist.barrier()
    return final


def latest(directory: Path) -> Path | None:
    """The complete checkpoint of the most steps, or None."""
    complete = [path for path in directory.glob("step-*") if not path.name.endswith(_PARTIAL)]
    return max(complete, default=None, key=lambda path: path.name)


def read_state(checkpoint: Path) -> TrainState:
    """What the checkpoint says of itself. Raises ValueError when it is damaged."""
    try:
        return TrainState(**json.loads((checkpoint / _STATE_FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"checkpoint {checkpoint} is damaged ({error}); remove it to go on from the one before"
        ) from error


def check(state: TrainState, checkpoint: Path, *, world_size: int, data: str) -> None:
    """Raise ValueError unless this world may go on from the checkpoint."""
    if state.world_size != world_size:
        raise ValueError(
            f"checkpoint {checkpoint} was written by {state.world_size} ranks and this world has {world_size}: "
            f"start {state.world_size} ranks"
        )
    if state.data != data:
        raise ValueError(
            f"checkpoint {checkpoint} was trained on data whose manifest has SHA-256 {state.data[:16]}..., and the "
            f"data now there has {data[:16]}...: bring back the old data, or name another run_directory"
        )


def load(engine: DeepSpeedEngine, checkpoint: Path) -> None:
    """Read weights and optimizer state back into the engine. Collective."""
    path, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if path is None:
        raise ValueError(f"checkpoint {checkpoint} has no files that DeepSpeed can read; remove it to go on without")


def _sync(directory: Path) -> None:
    """Flush the files and the directory to disk, so that the rename cannot become visible before them."""
    for path in [*directory.iterdir(), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
