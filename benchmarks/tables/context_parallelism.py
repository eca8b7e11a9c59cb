"""Tables on context parallelism and its kernels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from .table import Cells, Row, Table

RESULTS = "context-parallelism-results.md"


def groups(rows: Sequence[Row], *columns: str) -> Iterator[list[Row]]:
    """Yield adjacent rows that are equal in some columns, together."""
    for _, group in groupby(rows, key=lambda row: [row[column] for column in columns]):
        yield list(group)


def precision(record: Any) -> Iterator[Cells]:
    """Yield the errors of one kernel and of grids, in thousandths, and the bytes that a rank sends."""
    rows = {(row["member"], row["ranks"], row["results"]): row for row in record["rows"]}
    shown = [
        (("the exact, rounded", 1, ""), "the exact, rounded to bf16"),
        (("one kernel", 1, ""), "one kernel over all"),
        (("torch SDPA", 1, ""), "torch's attention in bf16"),
        (("token_ring", 4, "bf16"), "token_ring"),
        (("token_ring", 16, "bf16"), "token_ring"),
        (("token_ring", 16, "fp32"), "token_ring"),
        (("grid", 16, "bf16"), "grid 4 x 4"),
        (("grid", 16, "fp32"), "grid 4 x 4"),
        (("ring", 16, "fp32"), "ring"),
    ]
    for key, name in shown:
        row, (_, ranks, results) = rows[key], key
        errors = [f"{1e3 * row[tensor]:.2f}" for tensor in ("out", "dq", "dk", "dv")]
        sent = [f"{row[f'{of}_bytes'] / 2**20:.2f}" if results else "" for of in ("forward", "backward")]
        yield name, f"{ranks}" if results else "", results, *errors, *sent


FABRICS = {
    "InfiniBand": "NVSwitch, InfiniBand",
    "shared Ethernet": "NVSwitch, shared Ethernet",
    "mesh nodes": "mesh, InfiniBand",
}
"""Fabrics of cp_paper.py by their names in documents."""


def simulated(tokens: int, members: Sequence[str], cells: Sequence[tuple[str, str, int]]) -> Callable[[Any], Any]:
    """Return a function that yields (fabric, model, GPUs): times over the least compute, best bold, and auto's grid."""

    def rows(record: Any) -> Iterator[Cells]:
        of = {
            (row["fabric"], row["model"].split()[0], row["gpus"], row["member"]): row
            for row in (record if isinstance(record, list) else record["rows"])
            if row["tokens"] == tokens
        }
        for fabric, model, gpus in cells:
            cell = [of.get((FABRICS[fabric], model, gpus, member)) for member in (*members, "auto")]
            compute_ms = min(row["ms"] - row["exposed_ms"] for row in cell if row)
            times = [f"{row['ms'] / compute_ms:.2f}" if row else "-" for row in cell]
            best = min((time for time in times[:-1] if time != "-"), key=float)
            times[:-1] = [f"**{time}**" if time == best else time for time in times[:-1]]
            sizes = dict(re.findall(r"(\w+)=(\d+)", of[FABRICS[fabric], model, gpus, "auto"]["grid"]))
            grid = "·".join(sizes.get(axis, "1") for axis in ("heads", "query", "kv"))
            yield fabric, model, f"{gpus}", *times, grid

    return rows


SHOWN_TO_64 = [("8B", 32), ("8B", 64), ("70B", 64), ("MHA", 32), ("MHA", 64)]
TO_64 = simulated(
    2**17,
    ("ring", "ring both ways", "token_ring", "ulysses", "hybrid", "square grid"),
    [(fabric, *cell) for fabric in ("InfiniBand", "shared Ethernet") for cell in SHOWN_TO_64]
    + [("mesh nodes", *cell) for cell in (("8B", 64), ("MHA", 8), ("MHA", 32), ("MHA", 64))],
)
TO_256 = simulated(
    2**19,
    ("ring", "ring both ways", "token_ring", "hybrid", "square grid"),
    [(fabric, model, gpus) for fabric in FABRICS for model in ("8B", "70B", "MHA") for gpus in (128, 256)],
)

LAYOUTS = ("zigzag", "documents", "balanced", "auto", "each document in 2 cp", "all keys gathered")


def layouts(grid: str, ranks: Sequence[int], layouts: Sequence[str]) -> Callable[[Any], Iterator[Cells]]:
    """Return a function that yields the simulated layouts of packings on a grid: work, foreign keys, times, the bound
    by auto's messages, the packings in which auto takes at most 1.15, and zigzag's time over auto's."""

    def rows(record: Any) -> Iterator[Cells]:
        shown = [row for row in record["rows"] if row["grid"] == grid and row["ranks"] in ranks]
        for group in groups(shown, "ranks", "lengths"):
            of = {row["layout"]: row for row in group}
            pairs = [f"{of[layout][name]:.2f}" for name in ("work", "foreign") for layout in ("zigzag", "balanced")]
            times = [f"{of[layout]['time']:.2f}" for layout in layouts]
            auto = of["auto"]
            within = f"{sum(time <= 1.15 for time in auto['times'])} of {len(auto['times'])}"
            ratio = of["zigzag"]["time"] / auto["time"]
            yield (
                group[0]["lengths"],
                f"{group[0]['ranks']}",
                *pairs,
                *times,
                f"{auto['links']:.2f}",
                within,
                f"{ratio:.2f}",
            )

    return rows


def layouts_measured(record: Any) -> Iterator[Cells]:
    """Yield the measured times of packings by layout, the bound by auto's messages, zigzag's time over auto's, and the
    worst packing's inverse."""
    for group in groups(record["rows"], "ranks", "lengths"):
        of = {row["layout"]: row for row in group}
        times = [f"{of[layout]['time']:.2f}" for layout in LAYOUTS]
        ratios = of["zigzag"]["time"] / of["auto"]["time"], of["auto"]["worst_over_zigzag"]
        links, over = f"{of['auto']['links']:.2f}", [f"{ratio:.2f}" for ratio in ratios]
        lengths = group[0]["lengths"]
        name = {"stdlib": "standard library"}.get(lengths, lengths) if isinstance(lengths, str) else f"{lengths:,}"
        yield name, f"{group[0]['ranks']}", f"{of['zigzag']['work']:.2f}", *times, links, *over


def packing_on_the_host(record: Any) -> Iterator[Cells]:
    """Yield the milliseconds of the host for a packing, by grid."""
    for row in record["host"]:
        times = [f"{row[name]:.1f}" for name in ("choice_ms", "plan_ms", "masks_ms")]
        yield f"{row['ranks']}", f"{row['documents']}", f"`{row['of']}`", *times


def plans(record: Any) -> Iterator[Cells]:
    """Yield the milliseconds of the host for a plan, for layers, and for both, today's and those of before."""
    for row in record["plans"]:
        names = ("plan_ms", "step_ms", "both_ms", "plan_ms_there", "both_ms_there")
        yield f"`{row['what']}` of {row['ranks']}", *(f"{row[name]:.1f} ms" for name in names)


def lab_network(record: Any) -> Iterator[Cells]:
    """Yield the times of members over the one-way ring's, forward and with the backward, and auto's grid."""
    both = ("forward", "forward + backward")
    for group in groups(record["rows"], "fabric", "ranks", "heads"):
        of = {(row["schedule"], row["direction"]): row for row in group}
        ring = " / ".join(f"{of['ring', direction]['measured_ms']:,.0f}" for direction in both)
        members = ("ring_both_ways", "token_ring", "grid", "hybrid", "ulysses", "auto")
        times = [" / ".join(f"{of[member, direction]['times_ring']:.2f}" for direction in both) for member in members]
        took = of["auto", both[1]]["grid"].replace("kv_route=", "")
        yield group[0]["fabric"], f"{group[0]['ranks']}", group[0]["heads"], ring, *times, took


def kernels(record: Any) -> Iterator[Cells]:
    """Yield what the loops of the kernels in bf16 at head dim 128 ask of a multiprocessor, and the bounds."""
    for row in record["rows"]:
        if row["configuration"].startswith("bf16 d128") and row["kernel"] in TILED:
            loop = row["loops"][0]
            products = ", ".join(f"{count} of {shape}" for shape, count in loop["products"].items())
            spilled = f"{row['registers']}, {row['spill_bytes']} ({loop['spill_bytes']})"
            counts = f"{row['programs']}", f"{row['shared_bytes']:,}", spilled, products, f"{loop['barriers']}"
            yield f"`{row['kernel']}`", _blocks(row), *counts


def gluon_kernels(record: Any) -> Iterator[Cells]:
    """Yield what a group of warps asks of a multiprocessor in the loops of the Gluon kernels, and the bounds."""
    for row in record["rows"]:
        if row["configuration"].startswith("bf16 d128") and row["kernel"] in [f"gluon_{name}" for name in TILED]:
            loop, num_groups = row["loops"][0], len(row["loops"]) // 2  # each has a loop with masks and one without
            products = ", ".join(f"{count} of {shape}" for shape, count in loop["products"].items())
            spilled = f"{row['spill_bytes']} ({loop['spill_bytes']})"
            counts = f"{num_groups}", f"{row['shared_bytes']:,}", spilled, products, f"{loop['barriers']}"
            clocks = (f"{clocks:,}" for clocks in loop["clocks"].values())
            bounds = f"{loop['bound']:.2f}", f"{loop['share']:.2f}"
            yield f"`{row['kernel'].removeprefix('gluon_')}`", _blocks(row), *counts, *clocks, *bounds


def kernel_bounds(*records: Any) -> Iterator[Cells]:
    """Yield the clocks of each unit of a multiprocessor in a loop, and the bounds, for candidates of each kernel."""
    for record in records:
        for row in record["rows"]:
            loop = row["loops"][0]
            clocks = (f"{clocks:,}" for clocks in loop["clocks"].values())
            bounds = f"{loop['bound']:.2f}", f"{loop['share']:.2f}"
            yield f"`{row['kernel']}`", _blocks(row), f"{row['programs']}", *clocks, *bounds


def _blocks(row: Any) -> str:
    queries, keys, warps, stages = row["configuration"].split()[-1].split(",")
    return f"{queries} \N{MULTIPLICATION SIGN} {keys}, {warps}, {stages}"


TILED = ("forward", "backward_dkdv", "backward_dq")
LAYOUTS_RECORD = "cp_layouts_2026-11-23"
TABLES = [
    Table(RESULTS, "| | ranks | results |", precision, ("cp_precision_2_cores_2026-11-21",)),
    Table(
        RESULTS,
        "| fabric | model | GPUs | ring | both ways | token_ring | ulysses |",
        TO_64,
        ("cp_paper_64_gpus_2026-11-21",),
    ),
    Table(
        RESULTS,
        "| fabric | model | GPUs | ring | both ways | token_ring | hybrid |",
        TO_256,
        ("cp_paper_256_gpus_2026-11-23",),
    ),
    Table(
        RESULTS,
        "| documents, all keys at once |",
        layouts("all keys at once", (8, 32), LAYOUTS),
        (LAYOUTS_RECORD,),
    ),
    Table(
        RESULTS,
        "| documents, on the grid for packings |",
        layouts("packing", (32,), LAYOUTS[:-1]),
        (LAYOUTS_RECORD,),
    ),
    Table(
        RESULTS,
        "| documents, on the grid for one document |",
        layouts("one document", (8, 32), LAYOUTS[:-1]),
        (LAYOUTS_RECORD,),
    ),
    Table(RESULTS, "| documents, measured |", layouts_measured, ("cp_layouts_network_2_cores_2026-11-23",)),
    Table(RESULTS, "| ranks | documents | grid | choice |", packing_on_the_host, (LAYOUTS_RECORD,)),
    Table(RESULTS, "| fabric | ranks | heads | ring, ms |", lab_network, ("cp_lab_network_2_cores_2026-11-23",)),
    Table(RESULTS, "| grid | a plan |", plans, ("host_time_plans_2_cores_2026-11-22",)),
    Table(
        "kernels.md", "| kernel, bf16 | blocks | programs | shared", kernels, ("compile_sm_90_triton_3.7.1_2026-11-23",)
    ),
    Table("kernels.md", "| kernel in Gluon, bf16 |", gluon_kernels, ("compile_sm_90_triton_3.7.1_2026-11-23",)),
    Table(
        "kernels.md",
        "| candidate, bf16 | blocks |",
        kernel_bounds,
        tuple(f"compile_{name}_triton_3.7.1_2026-11-23" for name in TILED),
    ),
]
