"""The figures of a table in a document are those of one row of its record, or of one row computed from the record."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from statistics import mean, median
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NUMBER = re.compile(r"(?<![\w.])\d(?:[\d,]*\d)?(?:\.\d+)?(?!\d)")
UNITS = (1, 100, 1e3, 1e-3, 1e-6, 1e7, 1e-9, 2**-20)
"""Factors from the units of records to those of tables: %, ms, thousands, millions, 1e-7, billions, MiB."""

Row = dict[str, Any]


def rows_of(value: Any) -> Iterator[Row]:
    """Yield the rows of a record: of each list of tables, and of each table of named tables."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict | list):
        inner = list(value.items() if isinstance(value, dict) else enumerate(value))
    if inner and all(isinstance(row, dict) for _, row in inner):
        yield from ({"": name, **row} if isinstance(name, str) else row for name, row in inner)
    for _, child in inner:
        yield from rows_of(child)


def groups(record: Any, *columns: str) -> Iterator[list[Row]]:
    """Yield the rows of a record that are equal in some columns, together."""

    def at(row: Row) -> tuple[Any, ...]:
        return tuple(row[column] for column in columns)

    rows = record if isinstance(record, list) else record["rows"]
    yield from (list(group) for _, group in groupby(sorted(rows, key=at), key=at))


def joined(column: str) -> Callable[[Any], Iterator[Row]]:
    """Return a function that yields one row for all rows of a record with one value in a column."""
    return lambda record: ({"": group[0][column], "rows": group} for group in groups(record, column))


def over_compute(record: Any) -> Iterator[Row]:
    """Yield each cell of the simulated fabrics: the times of its members over the compute alone, and auto's grid."""
    for group in groups(record, "fabric", "model", "gpus", "tokens"):
        fabric = group[0]["fabric"]
        times = {row["member"]: row["ms"] / (row["ms"] - row["exposed_ms"]) for row in group}
        [grid] = [row["grid"] for row in group if row["member"] == "auto"]
        name = "mesh nodes" if fabric.startswith("mesh") else fabric.removeprefix("NVSwitch, ")
        model = group[0]["model"].split()[0]
        yield {"": name, "model": model, "gpus": group[0]["gpus"], "times": list(times.values()), "grid": [1, grid]}


def over_ring(record: Any) -> Iterator[Row]:
    """Yield each cell of the lab network: ms of the one-way ring, times over it by pass, and auto's last grid."""
    for group in groups(record, "fabric", "ranks", "heads"):
        shown = [row["measured_ms"] for row in group if row["schedule"] == "ring"]
        shown += [row["times_ring"] for row in group]
        grids = [row["grid"] for row in group if row["schedule"] == "auto" and "backward" in row["direction"]]
        yield {name: group[0][name] for name in ("fabric", "ranks", "heads")} | {"shown": shown, "grids": grids}


def layouts(grid: str | None = None) -> Callable[[Any], Iterator[Row]]:
    """Return a function that yields each cell of the packed documents on one of the record's grids."""

    def cells(record: Any) -> Iterator[Row]:
        rows = [row for row in record["rows"] if row.get("grid") == grid]
        for group in groups(rows, "ranks", "lengths"):
            of = {row["layout"]: row for row in group}
            shown = [
                row[name] for row in group for name in ("work", "foreign", "time", "worst_over_zigzag") if name in row
            ]
            ratio = of["zigzag"]["time"] / of["auto"]["time"]
            yield {"": group[0]["lengths"], "ranks": group[0]["ranks"], "shown": shown, "zigzag over auto": ratio}

    return cells


def kernels(record: Any) -> Iterator[Row]:
    """Yield each compiled kernel with the numbers of its configuration: bits, head dim, blocks, warps, stages."""
    for row in record["rows"]:
        yield row | {"configuration": [int(number) for number in re.findall(r"\d+", row["configuration"])]}


def mixes(record: Any) -> Iterator[Row]:
    """Yield the shares of each recipe's sources, and of its buckets: of the data and given, passes, tokens left."""
    for cells in groups(record, "recipe"):
        tokens = max(cell["read_tokens"] / cell["passes"] / cell["of_the_data"] for cell in cells if cell["passes"])
        for group in (*groups(cells, "source"), *groups(cells, "bucket")):
            of_data, *sums = (
                sum(cell[name] for cell in group)
                for name in ("of_the_data", "given", "read_tokens", "repeated_tokens", "never_reached_tokens")
            )
            asked, long = group[0]["asked_of_source"], [cell for cell in group if cell["bucket"] >= 65_536]
            yield {
                "asked": asked,
                "of_data": of_data,
                "sums": sums,
                "passes": sums[1] / of_data / tokens,
                "cells": long,
            }


def over_wait(record: Any) -> Iterator[Row]:
    """Yield each size of a checkpoint, with the times of the writers that block over the wait of ours."""
    for row in record:
        yield row | {name: [row[name], row[name] / row["stall"]] for name in ("blocking", "deepspeed")}


def by_fault(record: Any) -> Iterator[Row]:
    """Yield what each kind of fault cost."""
    for group in groups(record, "after"):
        steps, seconds = ([row[name] for row in group] for name in ("lost_steps", "lost_s"))
        costs = [mean(steps), max(steps), median(seconds), max(seconds)]
        yield {"": group[0]["after"], "statuses": str(group[0]["statuses"]), "costs": costs}


def over_released(record: Any) -> Iterator[Row]:
    """Yield each method's order of documents, with its time over that of the released loop."""
    for group in groups(record, "documents"):
        [released] = [row["seconds"] for row in group if row["method"] == "released"]
        yield from (row | {"of released": row["seconds"] / released} for row in group)


RESULTS_OF_CP = "context-parallelism-results.md"
TABLES: dict[str, tuple[str, Callable[[Any], Iterator[Row]], list[str]]] = {
    "| extra | commands |": ("api.md", rows_of, ["install_2_cores_2026-11-22"]),
    "| | ranks | results |": (RESULTS_OF_CP, rows_of, ["cp_precision_2_cores_2026-11-21"]),
    "| fabric | model | GPUs | ring | both ways | token_ring | ulysses |": (
        RESULTS_OF_CP,
        over_compute,
        ["cp_paper_64_gpus_2026-11-21"],
    ),
    "| fabric | model | GPUs | ring | both ways | token_ring | hybrid |": (
        RESULTS_OF_CP,
        over_compute,
        ["cp_paper_256_gpus_2026-11-23"],
    ),
    "| documents, all keys at once |": (RESULTS_OF_CP, layouts("all keys at once"), ["cp_layouts_2026-11-22"]),
    "| documents, on the grid for packings |": (RESULTS_OF_CP, layouts("packing"), ["cp_layouts_2026-11-22"]),
    "| documents, on the grid for one document |": (RESULTS_OF_CP, layouts("one document"), ["cp_layouts_2026-11-22"]),
    "| documents, measured |": (RESULTS_OF_CP, layouts(), ["cp_layouts_network_2_cores_2026-11-22"]),
    "| ranks | documents | grid | choice |": (RESULTS_OF_CP, rows_of, ["cp_layouts_2026-11-22"]),
    "| fabric | ranks | heads | ring, ms |": (RESULTS_OF_CP, over_ring, ["cp_lab_network_2_cores_2026-11-21"]),
    "| grid | a plan |": ("context-parallelism-results.md", rows_of, ["host_time_plans_2_cores_2026-11-22"]),
    "| kind | thousand tokens/s |": ("data.md", rows_of, ["prepare_kinds_2_cores_2026-11-22"]),
    "| one document of 34 MB |": ("data.md", rows_of, ["prepare_odd_1_core_2026-11-22"]),
    "| micro-batches | error, float32 |": ("design.md", rows_of, ["gradient_dtype_2_cores_2026-11-22"]),
    "| ranks | ZeRO 0 |": ("design.md", joined("ranks"), ["start_memory_2_cores_2026-11-22"]),
    "| tokens | ours | transformers |": ("design.md", joined("tokens"), ["train_step_2_cores_partial_2026-11-22"]),
    "| | tokens | ring | step 100 |": ("evaluation.md", rows_of, ["needles_2_cores_2026-11-23"]),
    "| model | logits within |": ("families.md", joined("model"), ["family_parity_2_cores_2026-11-22"]),
    "| parameters | largest matrix, fp32 |": ("families.md", rows_of, ["weights_memory_2_cores_2026-11-22"]),
    "| parameters | MB, ours / DeepSpeed's |": ("faults.md", over_wait, ["checkpoint_2_cores_2026-11-21"]),
    "| fault | exit statuses |": ("faults.md", by_fault, ["soak_2_cores_2026-11-22"]),
    "| division | ranks | length |": (
        "fitting.md",
        rows_of,
        ["fit_time_2_cores_2026-11-22", "fit_time_rings_2_cores_2026-11-22"],
    ),
    "| kernel, bf16 | head dim |": ("kernels.md", kernels, ["compile_sm_90_triton_3.7.1_2026-11-22"]),
    "| | of the data | asked |": ("mixes.md", mixes, ["published_mixes_2026-11-22"]),
    "| documents | method | seconds |": ("ordering.md", over_released, ["order_1_core_2026-11-21"]),
    "| corpus | order | documents a context |": ("ordering.md", rows_of, ["related_orders_2026-11-21"]),
    "| corpus | order | of one package |": ("ordering.md", rows_of, ["related_orders_2026-11-21"]),
    "| stage | documents/s |": ("ordering.md", rows_of, ["order_rates_1_core_2026-11-21"]),
    "| | all | <128 |": ("phases.md", rows_of, ["phases_2_cores_2026-11-22"]),
}
"""Document, rows and records of each table, by the beginning of its header."""


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


def holds(row: list[float], text: str) -> bool:
    """Return whether a row of a record has a number that is shown as `text`, in one of the units."""
    shown, half = float(text.replace(",", "")), 0.5 * 10.0 ** -len(text.partition(".")[2])
    return any(abs(number * unit - shown) <= half * (1 + 1e-9) for number in row for unit in UNITS)


def table(document: str, header: str) -> list[list[str]]:
    """Return the cells of a table's rows."""
    lines = [line.strip() for line in (ROOT / "docs" / document).read_text().splitlines()]
    [first] = [number for number, line in enumerate(lines) if line.startswith(header)]
    last = next(number for number in range(first, len(lines)) if not lines[number].startswith("|"))
    return [[cell.strip(" *`") for cell in line.strip("|").split("|")] for line in lines[first + 2 : last]]


def unlike(cells: list[str], rows: list[Row]) -> list[str]:
    """Return the figures of a table's row that no row of the record has together: those that the closest one lacks."""
    figures = [figure for cell in cells[1:] for figure in NUMBER.findall(cell)]
    named = [row for row in rows if cells[0] in row.values()]  # a row that has the name of the table's row comes first
    return min(
        ([figure for figure in figures if not holds(list(numbers(row)), figure)] for row in named or rows), key=len
    )


@pytest.mark.parametrize("header", TABLES)
def test_a_table_has_the_figures_of_its_record(header: str):
    document, of, records = TABLES[header]
    rows = [row for record in records for row in of(json.loads((RESULTS / f"{record}.json").read_text()))]
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
