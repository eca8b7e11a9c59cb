"""The format of a checkpoint on disk: a manifest of parameters and files, each file with its checksum.

    checkpoints/step-00000100/
        manifest.json             state of the run; shape of every parameter; size, SHA-256 and ranges of every file
        rank-00000.safetensors    ranges of fp32 weights and moments, as held by the rank that wrote it

A directory `step-N` is complete: it gets this name by one rename, after all its files are flushed. `step-N.partial` is
being written or was left by a crash, `step-N.damaged` does not match its manifest, `step-N.removed` was pruned.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ...data.files import sha256_of, sha256_of_json, sync, write_text

MANIFEST_FILE = "manifest.json"
PARTIAL, DAMAGED, REMOVED = ".partial", ".damaged", ".removed"
FORMAT = 1
_COMPLETE = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """State of a run besides weights and moments.

    The order of data and the learning rate follow from the step. There is no random state, since nothing random is
    drawn after the initial weights.
    """

    step: int
    """Number of steps done, skipped steps included."""
    data: str
    """SHA-256 of the manifest of the prepared data."""
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
    """Return the complete checkpoints in `directory`, latest step first."""
    found = [(step, path) for path in directory.glob("step-*") if (step := checkpoint_step(path)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


def write_checkpoint_manifest(directory: Path, manifest: CheckpointManifest) -> None:
    """Write the manifest into a checkpoint directory, with a hash of its own content, and flush it."""
    content = {"format": FORMAT, **asdict(manifest)}
    write_text(directory / MANIFEST_FILE, json.dumps({**content, "sha256": sha256_of_json(content)}, indent=1))


def read_checkpoint_manifest(checkpoint: Path) -> CheckpointManifest:
    """Read the manifest of a checkpoint. Raises ValueError if it is damaged."""
    file = checkpoint / MANIFEST_FILE
    try:
        content = json.loads(file.read_text())
        claimed = content.pop("sha256")
        if claimed != sha256_of_json(content):  # checked before the content is used
            raise ValueError(f"its SHA-256 is {sha256_of_json(content)[:16]}..., not {claimed[:16]}...")
        if (version := content.pop("format")) != FORMAT:
            raise ValueError(f"it has format {version}, and this version of LongRing reads format {FORMAT}")
        stored = content["state"]
        tuples = {name: tuple(stored[name]) for name in ("skipped", "recent_losses")}
        state = TrainState(**{**stored, **tuples})
        return CheckpointManifest(
            state=state,
            parameters={
                name: ParameterEntry(shape=tuple(entry["shape"]), cut=entry["cut"] and tuple(entry["cut"]))
                for name, entry in content["parameters"].items()
            },
            files={
                name: FileEntry(**{**entry, "ranges": {k: tuple(v) for k, v in entry["ranges"].items()}})
                for name, entry in content["files"].items()
            },
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        wrong = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{file}: damaged: {wrong}") from error


def find_damage(
    checkpoint: Path, manifest: CheckpointManifest, names: Iterable[str] | None = None, *, hashes: bool = True
) -> str | None:
    """Return a description of the first damaged file among `names` (None: all files), or None if there is none.

    A file is damaged if it is missing, cannot be read, or differs from the manifest in its size or, with `hashes`, in
    its SHA-256.
    """
    for name in manifest.files if names is None else names:
        file, entry = checkpoint / name, manifest.files[name]
        try:
            if (size := file.stat().st_size) != entry.bytes:
                return f"{file}: has {size:,} bytes, and the manifest says {entry.bytes:,}"
            if hashes and (found := sha256_of(file)) != entry.sha256:
                return f"{file}: has SHA-256 {found[:16]}..., and the manifest says {entry.sha256[:16]}..."
        except FileNotFoundError:
            return f"{file}: missing"
        except OSError as error:
            return f"{file}: cannot be read: {error}"
    return None


def last_good_checkpoint(directory: Path) -> tuple[Path, CheckpointManifest] | None:
    """Return the last complete checkpoint with a readable manifest and files of the right sizes, or None.

    Hashes are not compared.
    """
    for checkpoint in complete_checkpoints(directory):
        try:
            manifest = read_checkpoint_manifest(checkpoint)
        except ValueError:
            continue  # reported and put aside when a run resumes
        if find_damage(checkpoint, manifest, hashes=False) is None:
            return checkpoint, manifest
    return None


def check_trained_on(manifest: CheckpointManifest, checkpoint: Path, data: str) -> None:
    """Raise ValueError unless the checkpoint was trained on the data with this manifest hash."""
    if manifest.state.data != data:
        raise ValueError(
            f"checkpoint {checkpoint}: was trained on data whose manifest has SHA-256 {manifest.state.data[:16]}..., "
            f"and the manifest now has {data[:16]}...; bring back the old data, or name another run_directory"
        )


def publish_checkpoint(partial: Path) -> Path:
    """Rename a directory whose files are all flushed from `step-N.partial` to `step-N`; return the new path."""
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
    sync(partial)  # before the rename, so that the name never stands for missing entries
    partial.rename(final)
    sync(final.parent)
    return final


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint."""
    # Renamed first: a directory that has lost some of its files never counts as a complete checkpoint.
    aside = checkpoint.with_name(checkpoint.name + REMOVED)
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside)


def put_checkpoint_aside(checkpoint: Path) -> None:
    """Rename a damaged checkpoint to `step-N.damaged`, replacing an earlier one of the same step."""
    aside = checkpoint.with_name(checkpoint.name + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)


def clear_leftovers(directory: Path) -> None:
    """Delete the partial and removed directories that interrupted saves and removals left behind."""
    for leftover in [*directory.glob(f"step-*{PARTIAL}"), *directory.glob(f"step-*{REMOVED}")]:
        shutil.rmtree(leftover)


def steps_to_prune(steps: Iterable[int], keep_last: int, keep_every_steps: int) -> list[int]:
    """Return the steps whose checkpoints retention deletes.

    It keeps the last `keep_last` steps and every multiple of `keep_every_steps` (0: no multiples).
    """
    ordered = sorted(steps)
    older = ordered[: max(0, len(ordered) - keep_last)]
    return [step for step in older if not keep_every_steps or step % keep_every_steps]


def prune_checkpoints(directory: Path, keep_last: int, keep_every_steps: int) -> list[Path]:
    """Delete the checkpoints that retention does not keep; return their former paths."""
    by_step = {checkpoint_step(path): path for path in complete_checkpoints(directory)}
    gone = [by_step[step] for step in steps_to_prune(filter(None, by_step), keep_last, keep_every_steps)]
    for checkpoint in gone:
        remove_checkpoint(checkpoint)
    return gone
