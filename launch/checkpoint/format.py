"""What a checkpoint is on disk: a manifest of parameters and files, each file with its checksum.

    checkpoints/step-00000100/
        manifest.json             state of the run, every parameter's shape, every file's size, SHA-256 and ranges
        rank-00000.safetensors    ranges of fp32 weights and moments, as the rank that wrote it held them

A directory `step-N` is complete: it got this name by one rename after all was written and flushed. `step-N.partial` is
being written or was left by a crash, `step-N.damaged` was found not to match its manifest, `step-N.removed` was pruned.
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
    """Everything beside weights and moments that a run needs to go on.

    The order of data and the learning rate follow from the step, and nothing random is drawn after the first weights.
    """

    step: int
    """Steps done, those skipped included."""
    data: str
    """SHA-256 of the prepared data's manifest."""
    world_size: int
    """Ranks that wrote it."""
    tensor: int
    """Their tensor-parallel degree."""
    zero_stage: int
    skipped: tuple[int, ...] = ()
    """Which of the steps changed no weights: their gradients were not finite, or a spike's batches were left out."""
    recent_losses: tuple[float, ...] = ()
    """Of the last steps, oldest first: what a spike is told by."""

    @property
    def updates(self) -> int:
        """Steps that changed the weights. With the order of data, they are the ledger of what was trained."""
        return self.step - len(self.skipped)


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One rank's file."""

    bytes: int
    sha256: str
    slice: int
    """Which tensor-parallel slice its ranges are of."""
    ranges: dict[str, tuple[int, int]]
    """By parameter: first element, and how many, of the flattened slice."""


@dataclass(frozen=True, kw_only=True)
class ParameterEntry:
    """A parameter's whole shape; how it was cut into slices, as (dim, stride), or None."""

    shape: tuple[int, ...]
    cut: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    """What a checkpoint says of itself."""

    state: TrainState
    parameters: dict[str, ParameterEntry] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Of all files but the manifest."""
        return sum(entry.bytes for entry in self.files.values())


def checkpoint_name(step: int) -> str:
    """Directory of the checkpoint after `step`."""
    return f"step-{step:08d}"


def checkpoint_step(checkpoint: Path) -> int | None:
    """The step of a complete checkpoint's directory, or None of any other."""
    found = _COMPLETE.fullmatch(checkpoint.name)
    return int(found[1]) if found else None


def complete_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints by step, the last first."""
    found = [(step, path) for path in directory.glob("step-*") if (step := checkpoint_step(path)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


def write_checkpoint_manifest(directory: Path, manifest: CheckpointManifest) -> None:
    """Write and flush it, with a hash of itself."""
    content = {"format": FORMAT, **asdict(manifest)}
    write_text(directory / MANIFEST_FILE, json.dumps({**content, "sha256": sha256_of_json(content)}, indent=1))


def read_checkpoint_manifest(checkpoint: Path) -> CheckpointManifest:
    """What the checkpoint says of itself. Raises ValueError that names the file when that is damaged."""
    file = checkpoint / MANIFEST_FILE
    try:
        content = json.loads(file.read_text())
        claimed = content.pop("sha256")
        if claimed != sha256_of_json(content):
            raise ValueError(f"its SHA-256 is {sha256_of_json(content)[:16]}..., not {claimed[:16]}...")
        if (version := content.pop("format")) != FORMAT:
            raise ValueError(f"it has format {version}, and this LongRing reads format {FORMAT}")
        told = content["state"]
        lists = {name: tuple(told[name]) for name in ("skipped", "recent_losses")}
        state = TrainState(**{**told, **lists})
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
        raise ValueError(f"{file} is damaged: {wrong}") from error


def find_damage(
    checkpoint: Path, manifest: CheckpointManifest, names: Iterable[str] | None = None, *, hashes: bool = True
) -> str | None:
    """What is wrong with the files of these names (None: all), or None: each is there with its size and its SHA-256."""
    for name in manifest.files if names is None else names:
        file, entry = checkpoint / name, manifest.files[name]
        try:
            if (size := file.stat().st_size) != entry.bytes:
                return f"{file} has {size:,} bytes, {entry.bytes:,} in the manifest"
            if hashes and (found := sha256_of(file)) != entry.sha256:
                return f"{file} has SHA-256 {found[:16]}..., {entry.sha256[:16]}... in the manifest"
        except FileNotFoundError:
            return f"{file} is missing"
        except OSError as error:
            return f"{file} cannot be read: {error}"
    return None


def last_good_checkpoint(directory: Path) -> tuple[Path, CheckpointManifest] | None:
    """The last complete checkpoint whose manifest can be read and whose files have their sizes, or None."""
    for checkpoint in complete_checkpoints(directory):
        try:
            manifest = read_checkpoint_manifest(checkpoint)
        except ValueError:
            continue  # named and put aside when a run resumes; `longring checkpoints` names it too
        if find_damage(checkpoint, manifest, hashes=False) is None:
            return checkpoint, manifest
    return None


def check_trained_on(manifest: CheckpointManifest, checkpoint: Path, data: str) -> None:
    """Raise ValueError unless the checkpoint was trained on this data."""
    if manifest.state.data != data:
        raise ValueError(
            f"checkpoint {checkpoint} was trained on data whose manifest has SHA-256 {manifest.state.data[:16]}..., "
            f"and the data now there has {data[:16]}...: bring back the old data, or name another run_directory"
        )


def publish_checkpoint(partial: Path) -> Path:
    """Make a directory whose files are all flushed visible under its name."""
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
    sync(partial)
    partial.rename(final)
    sync(final.parent)
    return final


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint; it is out of sight before its first file goes."""
    aside = checkpoint.with_name(checkpoint.name + REMOVED)
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside)


def put_checkpoint_aside(checkpoint: Path) -> None:
    """Keep a damaged checkpoint under a name that does not count; an earlier one of the same step goes."""
    aside = checkpoint.with_name(checkpoint.name + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)


def clear_leftovers(directory: Path) -> None:
    """Delete what interrupted saves and removals have left."""
    for leftover in [*directory.glob(f"step-*{PARTIAL}"), *directory.glob(f"step-*{REMOVED}")]:
        shutil.rmtree(leftover)


def steps_to_prune(steps: Iterable[int], keep_last: int, keep_every_steps: int) -> list[int]:
    """Which of the checkpoints at `steps` retention lets go: all but the last ones and every n-th step's (0: none)."""
    ordered = sorted(steps)
    older = ordered[: max(0, len(ordered) - keep_last)]
    return [step for step in older if not keep_every_steps or step % keep_every_steps]


def prune_checkpoints(directory: Path, keep_last: int, keep_every_steps: int) -> list[Path]:
    """Delete what retention lets go -> what went."""
    by_step = {checkpoint_step(path): path for path in complete_checkpoints(directory)}
    gone = [by_step[step] for step in steps_to_prune(filter(None, by_step), keep_last, keep_every_steps)]
    for checkpoint in gone:
        remove_checkpoint(checkpoint)
    return gone
