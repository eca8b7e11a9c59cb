"""`longring checkpoints`: the checkpoints of a run, listed, verified and pruned."""

from __future__ import annotations

import shutil
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import track

from ..checkpoint.format import PARTIAL, checkpoint_step, complete_checkpoints, find_damage, read_checkpoint_manifest
from ..checkpoint.retention import leftovers, remove_checkpoint, steps_to_prune
from ..errors import DamageError
from ..tables import plain_table


def list_checkpoints(
    directory: Path, console: Console, *, verify: bool, prune: bool, keep_last: int, keep_every_steps: int
) -> int:
    """Print a table of all checkpoints in `directory`; return 0, or 1 if a complete one is damaged or not readable.

    `verify` hashes every file. `prune` deletes what retention does not keep, and directories put aside as damaged. A
    damaged checkpoint never counts among the `keep_last`; without `verify` only sizes are compared. A checkpoint that
    cannot be read, or is of another version of LongRing, is never deleted.
    """
    columns = ("step", "updates", "saved", "size", "mesh", "state")
    table = plain_table(str(directory), *columns, left=["mesh", "state"])
    good, problems = [], []
    found = sorted(complete_checkpoints(directory))
    for path in track(found, "verifying", console=console, transient=True) if verify else found:
        step, saved = checkpoint_step(path) or 0, datetime.fromtimestamp(path.stat().st_mtime)
        # Step and time are known even if the manifest is damaged.
        row = [f"{step:,}", "", saved.isoformat(" ", timespec="minutes"), "", ""]
        kind = "damaged"
        try:
            manifest = read_checkpoint_manifest(path)
            wrong = find_damage(path, manifest, hashes=verify)
            state = manifest.state
            row[1] = f"{state.updates:,}"
            mesh = f"{state.world_size:,} / tensor {state.tensor}, ZeRO {state.zero_stage}"
            row[3:] = _size(manifest.num_bytes), mesh
        except DamageError as error:
            wrong = str(error)
        except (OSError, ValueError) as error:
            wrong, kind = str(error), "unreadable"
        if wrong is None:
            good.append((step, path))
            table.add_row(*row, "verified" if verify else "whole")
        else:
            problems.append((kind, wrong))
            table.add_row(*row, f"[red]{kind}[/]")
    incomplete = leftovers(directory)
    for path, step in incomplete.items():
        table.add_row(f"{step:,}", *[""] * 4, f"[yellow]{path.suffix[1:]}[/]")
    console.print(table if found or incomplete else f"{directory}: no checkpoint yet")
    for kind, text in problems:
        console.print(f"[red]{kind}:[/] {escape(text)}", soft_wrap=True, highlight=False)
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
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}"
