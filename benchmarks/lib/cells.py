"""Cells of an experiment, arms trained with several seeds: each has a stored result, so hours of them may be cut.

A cell that has no result is measured; its run in the same directory goes on from its last checkpoint. Several processes
share the cells of a directory: each takes those that no other has begun.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
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
    """Measure each cell that has no result and that no other process measures, and store its result.

    A cell that raises an error ends the call; the others have their results.
    """
    for cell in cells:
        file = result_file(folder, cell)
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with held(file.with_suffix(".lock")):
                if not file.exists():
                    write_text(file, json.dumps({**cell._asdict(), **measure(cell)}, indent=1) + "\n")
        except HeldError:
            continue


def results(folder: Path, cells: Sequence[Cell]) -> Iterator[Row]:
    """Yield the stored results of cells."""
    for cell in cells:
        if (file := result_file(folder, cell)).exists():
            yield json.loads(file.read_text())
