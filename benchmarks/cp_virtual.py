"""The family of context parallelism on virtual ranks: all ranks of a plan on one device, messages as copies.

    python benchmarks/cp_virtual.py --json rows.json
    python benchmarks/cp_virtual.py --quick             # a minute; also runs on a CPU, in small sizes

Each member's out, lse, dq, dk and dv are compared with those of one kernel over the whole sequence before they are
rounded: its fp32 sums, and for inputs in fp32 what it finds in fp64. Rounding these to the dtype is the unit, and
`sizes.FACTOR` units are allowed, as there: a member may be as far from the one kernel as that from the exact result.
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
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))  # scripts find each other even under PYTHONSAFEPATH
from cases import (
    LEAST_ROUNDS,
    Case,
    Phase,
    Row,
    about,
    elapsed_ms,
    inputs,
    interleaved_ms,
    layout_of,
    moment,
    synchronize,
)
from package import load
from rich import box
from rich.console import Console
from rich.table import Table
from sizes import compared
from torch import Tensor

front_door, layout, masks = load("kernels.attention"), load("kernels.layout"), load("kernels.mask")
execute, grids, visible = load("parallel.cp.execute"), load("parallel.cp.grid"), load("parallel.cp.visible")
cp_heads, cp_layout, transports = load("parallel.cp.heads"), load("parallel.cp.layout"), load("parallel.cp.transports")

BAR = 1.05
"""All tiles of all ranks over one kernel over the whole sequence."""
PARTS = 16
RESULTS = ("out", "lse", "dq", "dk", "dv")
WARM_TOKENS = 256
"""A rank's in the run that compiles kernels before the clock starts."""
ALL = ("token_ring", "ring", "grid", "hybrid", "ulysses")


class Question(NamedTuple):
    """One attention, and the members that divide it among `size` ranks."""

    case: Case
    size: int
    members: tuple[str, ...]

    @property
    def sight(self) -> Any:
        """Who sees whom."""
        return visible.Sight(window=self.case.tokens // 32 - 3 if self.case.mask == "window" else None)

    def problem(self, member: str, backend: str, **options: Any) -> Any:
        """A member's division of it, zigzag."""
        whole = layout_of(self.case)
        shares = [cp_layout.zigzag(self.case.tokens, rank, self.size).runs for rank in range(self.size)]
        layouts = tuple(layout.SeqLayout(runs, whole.document_starts) for runs in shares)
        return execute.Problem(grid_of(member, self.size), layouts, self.sight, backend, **options)

    def unfit(self, member: str) -> str | None:
        """Why a member cannot divide its heads."""
        return grid_of(member, self.size).unfit(self.case.heads, self.case.kv_heads)


def grid_of(member: str, size: int) -> Any:
    """A named member; `hybrid` takes two nodes."""
    return grids.CpGrid.hybrid(2, size // 2) if member == "hybrid" else grids.NAMED[member](size)


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


def share_of(x: Tensor, of: Any) -> Tensor:
    """The tokens of a layout, of all the tokens."""
    return torch.cat([x[:, start:stop] for start, stop in of.runs], dim=1)


def put_share(whole: Tensor, part: Tensor, of: Any) -> None:
    """The way back."""
    at = 0
    for start, stop in of.runs:
        whole[:, start:stop] = part[:, at : at + stop - start]
        at += stop - start


def forward_in_process(problem: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Any]]:
    """out of every rank, and what it saves."""
    transport = transports.InProcess()
    shares = [[share_of(x, of) for x in (q, k, v)] for of in problem.layouts]
    found = transport.drive([execute.forward(problem, rank, *x, transport) for rank, x in enumerate(shares)])
    return [out for out, _ in found], [saved for _, saved in found]


def backward_in_process(problem: Any, dout: Tensor, saved: list[Any], kv_heads: int) -> list[tuple[Tensor, ...]]:
    """dq, dk, dv of every rank."""
    transport = transports.InProcess()
    shares = [share_of(dout, of) for of in problem.layouts]
    return transport.drive(
        [execute.backward(problem, rank, x, saved[rank], kv_heads, transport) for rank, x in enumerate(shares)]
    )


def joined(
    problem: Any, tensors: tuple[Tensor, ...], outs: list[Tensor], saved: list[Any], grads: list[Any]
) -> dict[str, Tensor]:
    """What the ranks found, in the order of the sequence."""
    q, k, v = tensors
    found = {name: torch.empty_like(x) for name, x in (("out", q), ("dq", q), ("dk", k), ("dv", v))}
    for of, out, parts in zip(problem.layouts, outs, grads, strict=True):
        for name, part in zip(("out", "dq", "dk", "dv"), (out, *parts), strict=True):
            put_share(found[name], part, of)
    lses = [x[4].transpose(1, 2) for x in saved]
    lse = lses[0].new_empty((1, q.shape[1], q.shape[2]))
    for rank, part in enumerate(lses):
        schedule, plan = problem.plan("forward", rank)
        mine = cp_heads.heads_of(q.shape[2], rank, problem.grid.heads)
        put_share(lse[:, :, mine], part, schedule.layouts[plan.place])
    return found | {"lse": lse.transpose(1, 2)}


class Whole:
    """One kernel over the whole sequence."""

    def __init__(self, question: Question, device: str, backend: str, tensors: tuple[Tensor, ...]) -> None:
        whole = layout_of(question.case)
        self.mask = masks.make_mask(whole, whole, window=question.sight.window, device=device)
        self.backend, self.tensors = backend, tensors

    def forward(self, _: Any, running: Any = None) -> tuple[Tensor, Tensor]:
        """out, lse."""
        q, k, v, _ = self.tensors
        return front_door.attention_forward(q, k, v, self.mask, running=running, backend=self.backend)

    def backward(self, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv in fp32."""
        q, k, v, dout = self.tensors
        out, lse = found
        into = tuple(front_door.zeros_fp32(x) for x in (q, k, v))
        delta = front_door.row_delta(dout, out.to(q.dtype))
        front_door.attention_backward(dout, q, k, v, lse, delta, self.mask, into=into, backend=self.backend)
        return into

    def results(self) -> dict[str, Tensor]:
        """In fp32 at least, not rounded to the dtype of inputs in 16 bit."""
        out, lse = self.forward(None, front_door.no_result(self.tensors[0]))
        return dict(zip(RESULTS, (out, lse, *self.backward((out, lse))), strict=True))


class Call(NamedTuple):
    """One kernel call: which rows of which of the blocks."""

    queries: int
    query_rows: slice
    keys: int
    key_rows: slice
    mask: Any


class Tiles:
    """The kernel calls of all ranks of a problem, on the slices that the executor makes, and no messages.

    Blocks are those of each rank: its place's tokens, its heads. What ranks add to the results for one block is added
    to one running result, so that no rank waits and the sum is the attention of the whole.
    """

    def __init__(self, problem: Any, device: str, tensors: tuple[Tensor, ...]) -> None:
        self.backend, heads = problem.backend, problem.grid.heads
        self.calls: dict[str, list[Call]] = {"forward": [], "backward": []}
        self.blocks: list[list[Tensor]] = []
        for rank in range(problem.grid.size):
            for direction, calls in self.calls.items():
                schedule, plan = problem.plan(direction, rank)
                shard = rank - plan.place * heads
                for tile in filter(None, (step.tile for step in plan.steps)):
                    mask = execute.mask_of(tile, schedule.layouts, problem.sight, device)
                    queries, keys = (owner * heads + shard for owner in (tile.query_owner, tile.key_owner))
                    calls.append(Call(queries, slice(*tile.query_rows), keys, slice(*tile.key_rows), mask))
            mine = [x[:, :, cp_heads.heads_of(x.shape[2], rank, heads)] for x in tensors]
            self.blocks.append([share_of(x, schedule.layouts[plan.place]).contiguous() for x in mine])

    def num_pairs(self, direction: str) -> int:
        """Visible pairs, times the heads of a block."""
        return sum(call.mask.num_pairs * self.blocks[0][0].shape[2] for call in self.calls[direction])

    def forward(self, _: Any) -> list[tuple[Tensor, Tensor]]:
        """out, lse of every block."""
        results = [front_door.no_result(q) for q, *_ in self.blocks]
        for at, rows, keys_at, keys, mask in self.calls["forward"]:
            (q, *_), (_, k, v, _), (out, lse) = self.blocks[at], self.blocks[keys_at], results[at]
            front_door.attention_forward(
                q[:, rows], k[:, keys], v[:, keys], mask, running=(out[:, rows], lse[:, :, rows]), backend=self.backend
            )
        return [(out.to(q.dtype), lse) for (out, lse), (q, *_) in zip(results, self.blocks, strict=True)]

    def backward(self, found: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """dq, dk, dv of every block in fp32."""
        deltas = [front_door.row_delta(dout, out) for (*_, dout), (out, _) in zip(self.blocks, found, strict=True)]
        grads = [tuple(front_door.zeros_fp32(x) for x in (q, k, v)) for q, k, v, _ in self.blocks]
        for at, rows, keys_at, keys, mask in self.calls["backward"]:
            (q, _, _, dout), (_, k, v, _) = self.blocks[at], self.blocks[keys_at]
            (dq, _, _), (_, dk, dv) = grads[at], grads[keys_at]
            front_door.attention_backward(
                dout[:, rows], q[:, rows], k[:, keys], v[:, keys], found[at][1][:, :, rows], deltas[at][:, :, rows],
                mask, into=(dq[:, rows], dk[:, keys], dv[:, keys]), backend=self.backend,
            )  # fmt: skip
        return grads


def worst(got: dict[str, Tensor], truth: dict[str, Tensor], q: Tensor) -> Row:
    """Errors of the worst of `PARTS` parts of the sequence, see `sizes.compared`."""
    found = []
    for start in range(0, q.shape[1], q.shape[1] // PARTS):
        part = slice(start, start + q.shape[1] // PARTS)
        cuts = ({name: x[:, :, part] if name == "lse" else x[:, part] for name, x in y.items()} for y in (got, truth))
        found.append(compared("", *cuts, q[:, part]))
    errors = {name: max((row[name] for row in found), key=lambda x: (x != x, x)) for name in RESULTS}  # nan is worst
    limits = {f"{name}_limit": found[0][f"{name}_limit"] for name in RESULTS}
    return errors | limits | {"right": all(row["right"] for row in found)}


def in_process_row(problem: Any, truth: dict[str, Tensor], tensors: tuple[Tensor, ...], device: str) -> Row:
    """Forward and backward of all ranks once, with their messages."""
    q, k, v, dout = tensors
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    marks = [moment(device)]
    outs, saved = forward_in_process(problem, q, k, v)
    marks.append(moment(device))
    grads = backward_in_process(problem, dout, saved, k.shape[2])
    marks.append(moment(device))
    synchronize(device)
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else None
    times = {
        f"in_process_{name}_ms": elapsed_ms(*marks[at : at + 2]) for at, name in enumerate(("forward", "backward"))
    }
    return worst(joined(problem, (q, k, v), outs, saved, grads), truth, q) | times | {"peak_bytes": peak}


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
        problem = question.problem(member, backend)
        tiles = Tiles(problem, device, tensors)  # first, since it makes the masks, which training makes once as well
        phases[member] = [tiles.forward, tiles.backward]
        found[member] = in_process_row(problem, truth, tensors, device)
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
