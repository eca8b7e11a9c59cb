"""The figures of a table that a document took from a record are those of one row of the record."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLES = {
    "| extra | commands |": ("api.md", ["install_2_cores_2026-11-22"]),
    "| | ranks | results |": ("context-parallelism-results.md", ["cp_precision_2_cores_2026-11-21"]),
    "| grid | a plan |": ("context-parallelism.md", ["host_time_plans_2_cores_2026-11-22"]),
    "| | tokens | ring | step 100 |": ("evaluation.md", ["needles_2_cores_2026-11-22"]),
    "| model | logits within |": ("families.md", ["family_parity_2_cores_2026-11-22"]),
    "| parameters | largest matrix, fp32 |": ("families.md", ["weights_memory_2_cores_2026-11-22"]),
    "| division | ranks | length |": (
        "fitting.md",
        ["fit_time_2_cores_2026-11-22", "fit_time_rings_2_cores_2026-11-22"],
    ),
    "| stage | documents/s |": ("ordering.md", ["order_rates_1_core_2026-11-21"]),
    "| corpus | order | of one package |": ("ordering.md", ["related_orders_2026-11-21"]),
}
"""Document and records of each table, by the beginning of its header. Tables of ratios and of means are not here."""
NUMBER = re.compile(r"(?<![\w.])\d(?:[\d,]*\d)?(?:\.\d+)?(?!\d)")
UNITS = (1, 100, 1e3, 1e-3, 1e-6, 1e7, 1e-9, 2**-20)
"""Factors from the units of records to those of tables: %, ms, thousands, millions, 1e-7, billions, MiB."""


def numbers(value: Any) -> Iterator[float]:
    """Yield the numbers of a value of a record, also those in its texts and names."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from numbers(name)
            yield from numbers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, str):
        yield from (float(found.replace(",", "")) for found in NUMBER.findall(value))
    elif isinstance(value, int | float):
        yield float(value)


def rows_of(value: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a record: of each list of tables, and of each table of named tables."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict | list):
        inner = list(value.items() if isinstance(value, dict) else enumerate(value))
    if inner and all(isinstance(row, dict) for _, row in inner):
        yield from ({"": name, **row} if isinstance(name, str) else row for name, row in inner)
    for _, child in inner:
        yield from rows_of(child)


def holds(row: list[float], text: str) -> bool:
    """Return whether a row of a record has a number that is shown as `text`, in one of the units."""
    shown, half = float(text.replace(",", "")), 0.5 * 10.0 ** -len(text.partition(".")[2])
    return any(abs(number * unit - shown) <= half * (1 + 1e-9) for number in row for unit in UNITS)


def table(document: str, header: str) -> list[list[str]]:
    """Return the cells of a table's rows."""
    lines = (ROOT / "docs" / document).read_text().splitlines()
    [first] = [number for number, line in enumerate(lines) if line.startswith(header)]
    last = next(number for number in range(first, len(lines)) if not lines[number].startswith("|"))
    return [[cell.strip(" *`") for cell in line.strip("|").split("|")] for line in lines[first + 2 : last]]


def unlike(cells: list[str], rows: list[dict[str, Any]]) -> list[str]:
    """Return the figures of a table's row that no row of the record has together: those that the closest one lacks."""
    figures = [figure for cell in cells[1:] for figure in NUMBER.findall(cell)]
    # A row of the document may stand for several of the record, such as one model in many divisions.
    of_name = [number for row in rows if cells[0] in row.values() for number in numbers(row)]
    candidates = [of_name, *(list(numbers(row)) for row in rows)]
    return min(([figure for figure in figures if not holds(row, figure)] for row in candidates), key=len)


@pytest.mark.parametrize("header", TABLES)
def test_a_table_has_the_figures_of_its_record(header: str):
    document, records = TABLES[header]
    rows = [row for record in records for row in rows_of(json.loads((RESULTS / f"{record}.json").read_text()))]
    text = (ROOT / "docs" / document).read_text()
    assert all(f"{record}.json" in text for record in records), "the document names its records"
    wrong = {cells[0]: missing for cells in table(document, header) if (missing := unlike(cells, rows))}
    assert not wrong
    # A figure that is changed in its last digit but one is noticed.
    cells = table(document, header)[-1]
    figure = max(NUMBER.findall(" ".join(cells[1:])), key=len)
    digit = figure.replace(",", "").replace(".", "")[-2]
    changed = [cell.replace(figure, figure.replace(digit, str((int(digit) + 5) % 10))) for cell in cells]
    assert unlike(changed, rows)
