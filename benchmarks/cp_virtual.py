"""The family of context parallelism on virtual ranks: all ranks of a plan on one device, messages as copies.

    python benchmarks/cp_virtual.py --json rows.json
    python benchmarks/cp_virtual.py --quick             # a minute; also runs on a CPU, in small sizes

Each member's out, lse, dq, dk and dv are compared with those of one kernel over the whole sequence before they are
rounded: its fp32 sums, and for inputs in fp32 what it finds in fp64. Rounding these to the dtype is the unit, and
`full_sizes.FACTOR` units are allowed: a member may be as far from the one kernel as that from the exact result.
The sequence is compared in 16 parts, and the worst counts, so that late tokens, whose gradients are small, are not lost
among early ones. "tiles" is the time of the kernel calls of all ranks, on the slices the executor gives them and with
its running results, over that of one kernel; members take turns in one run. It has no messages; the run in process has
them all, each a copy, and was timed once. Memory is the peak of that run beyond its inputs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # scripts find each other even under PYTHONSAFEPATH
from full_sizes import compared
from lib.cases import LEAST_ROUNDS, Case, Phase, Row, about, elapsed_ms, inputs, interleaved_ms, moment, synchronize
from lib.virtual_ranks import RESULTS, Question, Tiles, Whole, backward_in_process, forward_in_process, grid_of, joined
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

BAR = 1.05
"""All tiles of all ranks over one kernel over the whole sequence."""
PARTS = 16
WARM_TOKENS = 256
"""A rank's in the run that compiles kernels before the clock starts."""
ALL = ("token_ring", "ring", "grid", "hybrid", "ulysses")


def questions(device: str, quick: bool) -> list[Question]:
    """What matters most comes first; heads are as many as make a pass take seconds."""

    if device == "cpu":
        cpu = [Question(Case(mask, 2048, 1, 4, 2, 64, "float32"), 4, ALL) for mask in ("causal", "documents", "window")]
        more = [
            Question(Case("causal", 4096, 1, 8, heads, 64, "float32"), size, ALL) for heads, size in ((8, 2), (2, 8))
        ]
        return cpu if quick else cpu + more

    def question(mask: str, k_tokens: int, heads: int, kv_heads: int, size: int, members: tuple[str, ...]) -> Question:
        return Question(Case(mask, k_tokens * 1024, 1, heads, kv_heads, 128, "bfloat16"), size, members)

    found = [
        question("causal", 128, 16, 16, 16, ALL),
        question("documents", 128, 16, 4, 8, ALL),
        question("window", 128, 16, 4, 8, ALL),
    ]
    if quick:
        return found
    return [
        *found,
        question("causal", 1024, 2, 2, 16, ("token_ring", "grid")),
        question("causal", 128, 16, 4, 8, ALL),
        question("causal", 256, 8, 8, 4, ALL),
        question("causal", 128, 16, 4, 2, ("token_ring", "ring", "ulysses")),
        question("causal", 512, 4, 1, 8, ("token_ring", "ring", "grid", "hybrid")),
        question("causal", 1024, 4, 1, 16, ("token_ring", "grid")),
        question("causal", 512, 4, 4, 4, ALL),
        question("causal", 1024, 2, 2, 2, ("token_ring", "ulysses")),
        question("causal", 1024, 2, 2, 16, ("ring", "hybrid")),
    ]


def worst(got: dict[str, Tensor], truth: dict[str, Tensor], q: Tensor) -> Row:
    """Errors of the worst of `PARTS` parts of the sequence, see `full_sizes.compared`."""
    found = []
    for start in range(0, q.shape[1], q.shape[1] // PARTS):
        part = slice(start, start + q.shape[1] // PARTS)
        cuts = ({name: x[:, :, part] if name == "lse" else x[:, part] for name, x in y.items()} for y in (got, truth))
        found.append(compared("", *cuts, q[:, part]))
    errors = {name: max((row[name] for row in found), key=lambda x: (x != x, x)) for name in RESULTS}  # nan is worst
    limits = {f"{name}_limit": found[0][f"{name}_limit"] for name in RESULTS}
    return errors | limits | {"right": all(row["right"] for row in found)}


def in_process_row(spec: Any, truth: dict[str, Tensor], tensors: tuple[Tensor, ...], device: str) -> Row:
    """Forward and backward of all ranks once, with their messages."""
    q, k, v, dout = tensors
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    marks = [moment(device)]
    outs, saved = forward_in_process(spec, q, k, v)
    marks.append(moment(device))
    grads = backward_in_process(spec, dout, saved, k.shape[2])
    marks.append(moment(device))
    synchronize(device)
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else None
    times = {
        f"in_process_{name}_ms": elapsed_ms(*marks[at : at + 2]) for at, name in enumerate(("forward", "backward"))
    }
    return worst(joined(spec, (q, k, v), outs, saved, grads), truth, q) | times | {"peak_bytes": peak}


def question_rows(question: Question, device: str, backend: str, deadline: float) -> list[Row]:
    """A row of every member: results, then times beside each other."""
    tensors = tuple(x.detach() for x in inputs(question.case, device))
    whole = Whole(question, device, backend, tensors)
    started = time.time()
    wider = tuple(x.double() for x in tensors) if tensors[0].dtype == torch.float32 else tensors
    truth = Whole(question, device, backend, wider).results()
    synchronize(device)
    fitting = [member for member in question.members if question.unfit(member) is None]
    # The one pass just made tells what the rest takes: one in process a member, and rounds of tiles and of one kernel.
    num_passes = len(fitting) + LEAST_ROUNDS[device] * (len(fitting) + 1)
    if time.time() + num_passes * (time.time() - started) > deadline:
        return [left_out(question, member, "the time was spent") for member in question.members]
    phases: dict[str, list[Phase]] = {"one kernel": [whole.forward, whole.backward]}
    found: dict[str, Row] = {}
    pairs = whole.mask.num_pairs * question.case.heads
    for member in fitting:
        spec = question.spec(member, backend)
        tiles = Tiles(spec, device, tensors)  # first, since it makes the masks, which training makes once as well
        phases[member] = [tiles.forward, tiles.backward]
        found[member] = in_process_row(spec, truth, tensors, device)
        found[member]["right"] &= all(tiles.num_pairs(direction) == pairs for direction in tiles.calls)
    del truth
    times = interleaved_ms(phases, device)
    one = times["one kernel"]
    rows = []
    for member in question.members:
        if member not in found:
            rows.append(left_out(question, member, question.unfit(member) or ""))
            continue
        row = found[member]
        in_process = [row.pop("in_process_forward_ms"), row.pop("in_process_backward_ms")]
        for at, direction in enumerate(("forward", "backward")):
            row[f"{direction}_ms"] = round(one[at], 3)
            row[f"tiles_{direction}"] = round(times[member][at] / one[at], 4)
            row[f"in_process_{direction}"] = round(in_process[at] / one[at], 4)
        rows.append(known(question, member) | row | {"note": ""})
    return rows


def known(question: Question, member: str) -> Row:
    case = question.case._asdict()
    del case["flex"]
    return case | {"ranks": question.size, "member": member, "grid": str(grid_of(member, question.size))}


def left_out(question: Question, member: str, why: str) -> Row:
    return known(question, member) | {"right": None, "note": f"left out: {why}"}


def all_rows(device: str, backend: str, quick: bool, deadline: float) -> Iterator[Row]:
    """Rows as questions are answered; those that would end after `deadline` (of `time.time`) say so."""
    for question in questions(device, quick):
        if time.time() > deadline:
            yield from (left_out(question, member, "the time was spent") for member in question.members)
            continue
        small = question.case._replace(tokens=WARM_TOKENS * question.size)
        if device == "cuda":  # kernels are compiled before the clock starts
            question_rows(question._replace(case=small), device, backend, float("inf"))
            torch.cuda.empty_cache()
        yield from question_rows(question, device, backend, deadline)


def bars(rows: list[Row]) -> list[Row]:
    """The worst member, forward and backward."""
    found = []
    for direction in ("forward", "backward"):
        timed = [(row[f"tiles_{direction}"], row) for row in rows if f"tiles_{direction}" in row]
        value, row = max(timed, key=lambda x: x[0], default=(None, {}))
        found.append(
            {
                "bar": f"all tiles over one kernel, {direction}: at most {BAR}",
                "value": value,
                "met": "no row" if value is None else "met" if value <= BAR else "not met",
                "where": " ".join(str(row[x]) for x in ("mask", "tokens", "member", "ranks")) if row else "",
            }
        )
    return found


def show(rows: list[Row], console: Console) -> None:
    """A line for each member: its worst error in parts of what is allowed, and times over one kernel's."""
    table = Table(
        title="error: the worst over its limit; fwd, bwd: all tiles over one kernel; run: with messages",
        title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
    )  # fmt: skip
    columns = (
        "mask",
        "member",
        "ranks",
        "tokens",
        "heads",
        "error",
        "fwd",
        "bwd",
        "run fwd",
        "run bwd",
        "GiB",
        "right",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("mask", "member") else "right", no_wrap=True)
    for row in rows:
        cells = [row["mask"], row["member"], row["ranks"], row["tokens"], f"{row['heads']}/{row['kv_heads']}"]
        if row["right"] is not None:
            errors = {name: row[name] / row[f"{name}_limit"] for name in RESULTS}
            name = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
            ratios = [row[f"{kind}_{way}"] for kind in ("tiles", "in_process") for way in ("forward", "backward")]
            peak = row["peak_bytes"]
            cells += [f"{errors[name]:.2f} {name}", *(f"{x:.3f}" for x in ratios)]
            cells += ["" if peak is None else f"{peak / 2**30:.1f}", "yes" if row["right"] else "NO"]
        table.add_row(*map(str, cells), style="red" if row["right"] is False else None)
    console.print(table)
    for row in rows:
        if row["note"]:
            console.print(f"{row['mask']} {row['tokens']}, {row['ranks']} ranks, {row['member']}: {row['note']}")
    for bar in bars(rows):
        value = "" if bar["value"] is None else f"{bar['value']:.3f} ({bar['where']})"
        console.print(f"{bar['bar']}: {value} {bar['met']}", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few cases, about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, with device and versions")
    options = parser.parse_args()
    device, backend = ("cuda", "triton") if torch.cuda.is_available() else ("cpu", "torch_cpu")
    console = Console(width=100)
    console.print(about(device))
    rows: list[Row] = []
    with console.status("measuring"):
        for row in all_rows(device, backend, options.quick, float("inf")):
            rows.append(row)
            if options.json:
                options.json.write_text(
                    json.dumps({**about(device), "rows": rows, "bars": bars(rows)}, indent=1) + "\n"
                )
    show(rows, console)
    return 1 if any(row["right"] is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
