"""Cells of an experiment, arms trained with several seeds: each has a stored result, so hours of them may be cut.

A cell that has no result is measured; its run in the same directory goes on from its last checkpoint. Several processes
share the cells of a directory: each takes those that no other has begun. A record has the results of its cells, so a
directory on another machine can go on from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from longring.data.files import write_text
from longring.data.lock import HeldError, held

from .script import Row


class Cell(NamedTuple):
    """One arm of an experiment, trained with one seed."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Name of the cell's files: letters, digits, - and _."""
        return f"{self.arm.replace(' ', '_').replace(',', '')}-{self.seed}"


def grid(arms: Sequence[str], seeds: int) -> list[Cell]:
    """Return the cells of arms, all seeds of an arm before the next one."""
    return [Cell(arm, seed) for arm in arms for seed in range(seeds)]


def result_file(folder: Path, cell: Cell) -> Path:
    """Return the file of a cell's result in the directory of an experiment."""
    return folder / "results" / f"{cell.name}.json"


def run_cells(folder: Path, cells: Sequence[Cell], measure: Callable[[Cell], Row]) -> None:
    """Measure each cell that has no result and that no other process measures, and store its result with the date.

    A cell that raises an error ends the call; the others have their results.
    """
    for cell in cells:
        file = result_file(folder, cell)
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with held(file.with_suffix(".lock")):
                if not file.exists():
                    found = measure(cell)
                    row = {**cell._asdict(), "date": datetime.now(UTC).date().isoformat(), **found}
                    write_text(file, json.dumps(row, indent=1) + "\n")
        except HeldError:
            continue


def results(folder: Path, cells: Sequence[Cell]) -> Iterator[Row]:
    """Yield the stored results of cells."""
    for cell in cells:
        if (file := result_file(folder, cell)).exists():
            yield json.loads(file.read_text())


def measured_once(folder: Path, name: str, measure: Callable[[], Row]) -> Row:
    """Return what is measured once for all cells of a directory, and store it there."""
    file = folder / f"{name}.json"
    if not file.exists():
        write_text(file, json.dumps(measure(), indent=1) + "\n")
    return json.loads(file.read_text())


def restore(folder: Path, record: Path, cells: Sequence[Cell], once: Sequence[str] = ()) -> None:
    """Store the results of a record's cells, and what it has that was measured `once`, unless the directory has them.

    Ends the script if the record has a cell that the experiment does not have, or lacks what is measured once.
    """
    found = json.loads(record.read_text())
    files = {(cell.arm, cell.seed): result_file(folder, cell) for cell in cells}
    rows = {(row["arm"], row["seed"]): row for row in found["rows"]}
    if unknown := sorted(rows.keys() - files.keys()):
        raise SystemExit(f"error: {record}: has cells {unknown}, which are not of this experiment; name its own")
    if missing := [name for name in once if name not in found]:
        raise SystemExit(f"error: {record}: has no {missing}, as records of this experiment have; name another")
    contents = {files[key]: row for key, row in rows.items()} | {folder / f"{name}.json": found[name] for name in once}
    for file, content in contents.items():
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(content, indent=1) + "\n")
