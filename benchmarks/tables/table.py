"""A table in a document, whose rows a function makes from records of benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]
Cells = Sequence[str]


class Table(NamedTuple):
    """A table of a document: where it stands, and what its rows are."""

    document: str
    """Name of a file in docs/."""
    header: str
    """Beginning of the table's first line, which no other line of the document has."""
    rows: Callable[..., Iterator[Cells]]
    """A function of the contents of the records, which yields the cells of each row."""
    records: tuple[str, ...]
    """Names of the records, without .json."""

    def written(self, text: str) -> str:
        """Return the text of the document with the table's rows made anew. The header stays.

        Raises ValueError if the text has no such table, does not name its records, or if a row has other columns.
        """
        unnamed = [name for name in self.records if f"benchmarks/results/{name}.json" not in text]
        if unnamed:
            raise ValueError(f"docs/{self.document}: does not name {unnamed}; name the records of its tables")
        lines = text.splitlines(keepends=True)
        found = [number for number, line in enumerate(lines) if line.lstrip().startswith(self.header)]
        if len(found) != 1:
            raise ValueError(f"docs/{self.document}: {len(found)} lines begin with {self.header!r}; make it one")
        [first] = found
        last = next((n for n in range(first, len(lines)) if not lines[n].lstrip().startswith("|")), len(lines))
        header = lines[first]
        indent = header[: -len(header.lstrip())]
        rows = [f"{indent}{_line(cells)}\n" for cells in self.rows(*map(_record, self.records))]
        if any(row.count("|") != header.count("|") for row in rows):
            raise ValueError(f"docs/{self.document}: {self.header} has other columns than its rows; change its header")
        return "".join((*lines[: first + 2], *rows, *lines[last:]))


def _record(name: str) -> Any:
    return json.loads((RECORDS / f"{name}.json").read_text())


def _line(cells: Cells) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)
