"""Loading the weights that begin a run. The checks before the ranks start need none of its imports."""

from __future__ import annotations

from pathlib import Path

from ...data.files import sha256_of
from ...parallel.mesh import Mesh
from ...parallel.parameters import KINDS
from ...parallel.zero import DeepSpeedEngine
from ..checkpoint.files import CheckpointFiles
from ..checkpoint.format import MANIFEST_FILE
from ..checkpoint.load import load_stored, verified
from ..errors import DamageError
from ..together import on_all_ranks
from .directory import ModelDirectory
from .origin import Origin


def load_origin(engine: DeepSpeedEngine, origin: Origin, mesh: Mesh, *, moments: bool) -> None:
    """Load weights and, with `moments`, AdamW's moments and number of updates.

    The ranks share the hashing of a checkpoint. Raises ValueError on any rank if a file is damaged or not what `origin`
    describes, and CommonError if it cannot be read. Collective.
    """
    path = Path(origin.checkpoint)

    def opened() -> CheckpointFiles | ModelDirectory:
        if not (path / MANIFEST_FILE).is_file():
            directory = ModelDirectory(path)
            _check_same(path, directory.sha256, origin)
            return directory
        # The manifest first: by its hashes the files are verified next.
        _check_same(path / MANIFEST_FILE, sha256_of(path / MANIFEST_FILE), origin)
        try:
            return CheckpointFiles(path, verified(path, mesh))
        except DamageError as error:
            raise ValueError(f"weights of {path}: damaged: {error}; name another checkpoint") from error

    with on_all_ranks(mesh, opened) as stored:
        updates = stored.updates if moments and isinstance(stored, CheckpointFiles) else 0
        load_stored(engine, stored, mesh, kinds=KINDS if moments else KINDS[:1], updates=updates)  # [:1]: weights alone


def _check_same(path: Path, found: str, origin: Origin) -> None:
    if found != origin.sha256:
        raise ValueError(
            f"{path}: has SHA-256 {found[:16]}..., and had {origin.sha256[:16]}... when this start began; mount the "
            "same directory on all machines, and start again"
        )
