"""`longring checkpoints`: the checkpoints of a run, listed, verified and pruned."""

from __future__ import annotations

import shutil
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.progress import track

from ..checkpoint.format import (
    PARTIAL,
    CheckpointManifest,
    checkpoint_step,
    complete_checkpoints,
    find_damage,
    read_checkpoint_manifest,
)
from ..checkpoint.retention import leftovers, remove_checkpoint, steps_to_prune
from ..errors import DamageError
from ..tables import plain_table


class Listed(NamedTuple):
    """A directory of a checkpoint, whole or not."""

    path: Path
    step: int
    state: str
    """"verified", "whole", "damaged", "unreadable", "partial" or the like."""
    wrong: str | None
    """Damage, or why the checkpoint cannot be read."""
    saved: str = ""
    """Local time at which it became visible."""
    manifest: CheckpointManifest | None = None
    """None if it cannot be read."""

    def to_json(self) -> dict[str, Any]:
        """Return the entry as `--json` prints it."""
        of_run = self.manifest and self.manifest.state
        return {
            "path": str(self.path),
            "step": self.step,
            "state": self.state,
            "wrong": self.wrong,
            "saved": self.saved,
            "updates": of_run and of_run.updates,
            "bytes": self.manifest and self.manifest.num_bytes,
            "world_size": of_run and of_run.world_size,
            "tensor": of_run and of_run.tensor,
            "zero_stage": of_run and of_run.zero_stage,
        }

    def row(self) -> list[str]:
        """Return the cells of the table."""
        colour = {"whole": "", "verified": "", "damaged": "[red]", "unreadable": "[red]"}.get(self.state, "[yellow]")
        # Step, updates, saved, size, mesh, state.
        cells = [f"{self.step:,}", "", self.saved, "", "", f"{colour}{self.state}"]
        if self.manifest is not None:
            state = self.manifest.state
            cells[1] = f"{state.updates:,}"
            cells[3] = _size(self.manifest.num_bytes)
            cells[4] = f"{state.world_size:,} / tensor {state.tensor}, ZeRO {state.zero_stage}"
        return cells


def examine(path: Path, *, verify: bool) -> Listed:
    """Return the entry of a complete checkpoint; `verify` hashes its files, else only sizes are compared."""
    saved = datetime.fromtimestamp(path.stat().st_mtime).isoformat(" ", timespec="minutes")
    step, manifest = checkpoint_step(path) or 0, None  # known even if the manifest is damaged
    try:
        manifest = read_checkpoint_manifest(path)
        wrong = find_damage(path, manifest, hashes=verify)
        good = "verified" if verify else "whole"
        return Listed(path, step, "damaged" if wrong else good, wrong, saved, manifest)
    except DamageError as error:
        return Listed(path, step, "damaged", str(error), saved, manifest)
    except (OSError, ValueError) as error:
        return Listed(path, step, "unreadable", str(error), saved, manifest)


def list_checkpoints(
    directory: Path,
    console: Console,
    *,
    verify: bool,
    prune: bool,
    keep_last: int,
    keep_every_steps: int,
    as_json: bool = False,
) -> int:
    """Print a table of all checkpoints in `directory`; return 0, or 1 if a complete one is damaged or not readable.

    `verify` hashes every file. `prune` deletes what retention does not keep, and directories put aside as damaged. A
    damaged checkpoint never counts among the `keep_last`; without `verify` only sizes are compared. A checkpoint that
    cannot be read, or is of another version of LongRing, is never deleted. With `as_json` the table is printed as JSON,
    and everything else to standard error.
    """
    output, console = console, Console(stderr=True) if as_json else console
    found = sorted(complete_checkpoints(directory))
    shown = track(found, "verifying", console=console, transient=True) if verify else found
    listed = [examine(path, verify=verify) for path in shown]
    good = [(entry.step, entry.path) for entry in listed if entry.wrong is None]
    problems = [entry for entry in listed if entry.wrong is not None]
    incomplete = leftovers(directory)
    listed += [Listed(path, step, path.suffix[1:], None) for path, step in incomplete.items()]
    if as_json:
        output.print_json(data=[entry.to_json() for entry in listed])
    elif listed:
        table = plain_table(str(directory), "step", "updates", "saved", "size", "mesh", "state", left=["mesh", "state"])
        for entry in listed:
            table.add_row(*entry.row())
        console.print(table)
    else:
        console.print(f"{directory}: no checkpoint yet")
    for entry in problems:
        console.print(f"[red]{entry.state}:[/] {escape(entry.wrong or '')}", soft_wrap=True, highlight=False)
    if prune:
        gone = set(steps_to_prune([step for step, _ in good], keep_last, keep_every_steps))
        for path in [path for step, path in good if step in gone]:
            remove_checkpoint(path)
            console.print(f"removed {path.name}")
        for path in incomplete:
            if path.suffix != PARTIAL:  # a run may be writing it; the next start deletes it
                shutil.rmtree(path)
                console.print(f"removed {path.name}")
    return 1 if problems else 0


def _size(num_bytes: int) -> str:
    """Return a size with three digits and a unit, such as 12.3 GB."""
    size, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB", "PB"]
    while size >= 999.5 and len(units) > 1:  # with three digits, 999.5 would be 1e+03
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}"
