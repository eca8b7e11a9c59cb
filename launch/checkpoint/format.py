"""The format of a checkpoint on disk: a manifest of parameters and files, each file with its checksum.

    checkpoints/step-00000100/
        manifest.json             state of the run; shape of every parameter; size, SHA-256 and ranges of every file
        rank-00000.safetensors    ranges of fp32 weights and moments, as held by the rank that wrote it

A directory `step-N` is complete: it gets this name by one rename, after all its files are flushed. `step-N.partial` is
being written or was left by a crash, `step-N.damaged` does not match its manifest, `step-N.removed` was pruned.

Damage is content that contradicts its hash. A file that cannot be read may be whole, and a manifest of another version
is whole: both end a start, and neither is ever renamed.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from ...data.files import read_patiently, sha256_of, sha256_of_json, sync, write_text
from ...data.format.names import is_sha256
from ..errors import DamageError
from ..identity import Identity
from .content import MAX_BYTES, check_content

log = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
PARTIAL, DAMAGED, REMOVED = ".partial", ".damaged", ".removed"
FORMAT = 2
_COMPLETE = re.compile(r"step-(\d{8,})")
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class TrainState(Identity):
    """State of a run besides weights and moments, and the identity of the start that wrote it.

    The order of data and the learning rate follow from the step. There is no random state, since nothing random is
    drawn after the initial weights.
    """

    step: int
    """Number of steps done, skipped steps included."""
    world_size: int
    """Number of ranks that wrote the checkpoint."""
    tensor: int
    """Tensor-parallel degree of those ranks."""
    zero_stage: int
    """ZeRO stage of those ranks."""
    skipped: tuple[int, ...] = ()
    """Steps that changed no weights, since their gradients were not finite or their batches were left out."""
    recent_losses: tuple[float, ...] = ()
    """Losses of the last good steps, oldest first, from which a spike is detected."""

    @property
    def updates(self) -> int:
        """Number of steps that changed the weights."""
        return self.step - len(self.skipped)


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """The file of one rank."""

    bytes: int
    """Size of the file."""
    sha256: str
    """SHA-256 of the file in hexadecimal."""
    slice: int
    """Index of the tensor-parallel slice that the ranges are part of."""
    ranges: dict[str, tuple[int, int]]
    """First element and number of elements in the flattened slice, by parameter."""


@dataclass(frozen=True, kw_only=True)
class ParameterEntry:
    """A parameter, independent of any mesh."""

    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    cut: tuple[int, int] | None
    """(dim, stride) by which it was cut into tensor-parallel slices; None: it was not cut."""


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    """The description of a checkpoint: state of the run, parameters and files."""

    state: TrainState
    """State of the run after its step."""
    parameters: dict[str, ParameterEntry] = field(default_factory=dict)
    """Entry of every parameter, by name."""
    files: dict[str, FileEntry] = field(default_factory=dict)
    """Entry of every file except the manifest, by name."""

    @property
    def num_bytes(self) -> int:
        """Total size of all files except the manifest."""
        return sum(entry.bytes for entry in self.files.values())


def checkpoint_name(step: int) -> str:
    """Return the directory name of the checkpoint after `step`."""
    return f"step-{step:08d}"


def checkpoint_step(checkpoint: Path) -> int | None:
    """Return the step of a complete checkpoint from its directory name, or None for any other directory."""
    found = _COMPLETE.fullmatch(checkpoint.name)
    return int(found[1]) if found else None


def complete_checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints in `directory`, latest step first; none if it does not exist.

    Raises OSError if it cannot be listed.
    """
    # Path.glob would take a directory that cannot be listed for an empty one.
    paths = read_patiently(directory, lambda: list(directory.iterdir()) if directory.exists() else [])
    found = [(step, path) for path in paths if (step := checkpoint_step(path)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


def write_checkpoint_manifest(directory: Path, manifest: CheckpointManifest) -> None:
    """Write the manifest into a checkpoint directory, with a hash of its own content, and flush it."""
    content = {"format": FORMAT, **asdict(manifest)}
    write_text(directory / MANIFEST_FILE, json.dumps({**content, "sha256": sha256_of_json(content)}, indent=1))


def read_checkpoint_manifest(checkpoint: Path) -> CheckpointManifest:
    """Read the manifest of a checkpoint.

    Raises DamageError if it is missing or contradicts its hash, OSError if it cannot be read, and ValueError if it is
    too large or has a field that does not look as this version of LongRing writes it.
    """
    file = checkpoint / MANIFEST_FILE
    text = _read(file, _read_bounded)
    try:
        content = json.loads(text)
        claimed = content.pop("sha256")
        if not is_sha256(claimed):
            raise ValueError("it has no SHA-256 of its content")
        if claimed != (found := sha256_of_json(content)):
            raise ValueError(f"its SHA-256 is {found[:16]}..., not {claimed[:16]}...")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        wrong = f"it has no {error}" if isinstance(error, KeyError) else error
        raise DamageError(f"{file}: damaged: {wrong}") from error
    # After the hash: the version that a damaged manifest names means nothing.
    if (version := content.pop("format", None)) != FORMAT:
        raise ValueError(
            f"{file}: of another version of LongRing: it has format {version!r:.80}, and this version reads format "
            f"{FORMAT}; go on with that version, or name another run_directory"
        )
    if isinstance(content.get("state"), dict):
        content["state"].setdefault("order", 1)  # written before orders had versions
    try:
        check_content(content, checkpoint_step(checkpoint))
    except ValueError as error:
        raise ValueError(
            f"{file}: not as LongRing writes it: {error}; remove {checkpoint} to resume from the checkpoint before, or "
            "name another run_directory"
        ) from error
    stored = content["state"]
    return CheckpointManifest(
        state=TrainState(**{**stored, **{name: tuple(stored[name]) for name in ("skipped", "recent_losses")}}),
        parameters={
            name: ParameterEntry(shape=tuple(entry["shape"]), cut=entry["cut"] and tuple(entry["cut"]))
            for name, entry in content["parameters"].items()
        },
        files={
            name: FileEntry(**{**entry, "ranges": {k: tuple(v) for k, v in entry["ranges"].items()}})
            for name, entry in content["files"].items()
        },
    )


def _read_bounded(file: Path) -> bytes:
    """Return the content of a manifest. Raises ValueError if it is larger than any manifest is."""
    with file.open("rb") as stream:
        if (size := os.fstat(stream.fileno()).st_size) > MAX_BYTES:
            raise ValueError(
                f"{file}: has {size:,} bytes, and a manifest has at most {MAX_BYTES:,}; remove {file.parent} to resume "
                "from the checkpoint before"
            )
        return stream.read(MAX_BYTES)


def find_damage(
    checkpoint: Path, manifest: CheckpointManifest, names: Iterable[str] | None = None, *, hashes: bool = True
) -> str | None:
    """Return a description of the first damaged file among `names` (None: all files), or None if there is none.

    A file is damaged if it is missing, or differs from the manifest in its size or, with `hashes`, in its SHA-256.
    Raises OSError if a file cannot be read.
    """

    def measure(file: Path) -> tuple[int, str | None]:
        return file.stat().st_size, sha256_of(file) if hashes else None

    for name in manifest.files if names is None else names:
        file, entry = checkpoint / name, manifest.files[name]
        try:
            size, found = _read(file, measure)
        except DamageError as error:
            return str(error)
        if size != entry.bytes:
            return f"{file}: has {size:,} bytes, and the manifest says {entry.bytes:,}"
        if found is not None and found != entry.sha256:
            return f"{file}: has SHA-256 {found[:16]}..., and the manifest says {entry.sha256[:16]}..."
    return None


def _read(file: Path, read: Callable[[Path], _T]) -> _T:
    """Return `read(file)` for a file of a complete checkpoint.

    Raises DamageError if the file is missing, and OSError if it cannot be read.
    """

    def attempt() -> _T:
        try:
            return read(file)
        except FileNotFoundError as error:  # tried again, since a network file system may not find what is there
            raise OSError("not found") from error

    try:
        return read_patiently(file, attempt)
    except OSError as error:
        if _is_gone(file):
            raise DamageError(f"{file}: missing") from error
        raise


def _is_gone(file: Path) -> bool:
    """Return whether a new listing of a checkpoint lacks `file` and has the manifest.

    On a disk that is not mounted the directory is missing as well.
    """
    try:
        names = {path.name for path in file.parent.iterdir()}
    except OSError:
        return False
    # The manifest shows that this is the checkpoint's own listing; for the manifest itself any listing will do.
    return file.name not in names and (MANIFEST_FILE in names or file.name == MANIFEST_FILE)


def last_good_checkpoint(directory: Path) -> tuple[Path, CheckpointManifest] | None:
    """Return the last complete checkpoint with a readable manifest and files of the right sizes, or None.

    Hashes are not compared. Raises OSError if a checkpoint cannot be read, and ValueError if it is of another version:
    an earlier one would be the wrong answer.
    """
    for checkpoint in complete_checkpoints(directory):  # latest first
        try:
            manifest = read_checkpoint_manifest(checkpoint)
        except DamageError:
            continue  # reported and put aside when a run resumes
        if find_damage(checkpoint, manifest, hashes=False) is None:
            return checkpoint, manifest
    return None


def no_good_checkpoint(directory: Path) -> ValueError:
    """Return the error of a command that needs a checkpoint and for which `last_good_checkpoint` has found none."""
    if complete_checkpoints(directory):
        return ValueError(
            f"checkpoints {directory}: all are damaged; bring back a copy of one: `longring checkpoints` with --verify "
            "tells what is wrong with each"
        )
    return ValueError(f"checkpoints {directory}: no checkpoint yet; train first, with `longring train`")


def check_trained_on(manifest: CheckpointManifest, checkpoint: Path, data: str) -> None:
    """Raise ValueError unless the checkpoint was trained on the data with this manifest hash."""
    if manifest.state.data != data:
        raise ValueError(
            f"checkpoint {checkpoint}: was trained on data whose manifest has SHA-256 {manifest.state.data[:16]}..., "
            f"and the manifest now has {data[:16]}...; bring back the old data, or name another run_directory"
        )


def publish_checkpoint(partial: Path) -> Path:
    """Rename a directory whose files are all flushed from `step-N.partial` to `step-N`; return the new path.

    A rename that is reported as failed but has happened counts, since a network file system loses answers.
    """
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
    manifest = (partial / MANIFEST_FILE).read_bytes()  # `final` is recognized by it if the rename's answer is lost
    sync(partial)  # before the rename, so that the name never stands for missing entries
    try:
        partial.rename(final)
    except OSError as error:
        if not _is_published(final, manifest):
            raise
        log.warning("%s: reported as not renamed, and is there: %s", final, error)
    try:
        sync(final.parent)
    except OSError as error:  # the checkpoint is there, and a power loss may take it back
        log.warning("%s: is there, and its directory could not be flushed: %s", final, error)
    return final


def _is_published(final: Path, manifest: bytes) -> bool:
    try:
        return read_patiently(final, (final / MANIFEST_FILE).read_bytes) == manifest
    except OSError:
        return False
