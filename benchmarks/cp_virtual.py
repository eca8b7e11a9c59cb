"""Errors and tile costs of context parallelism: all ranks of a plan on one device, messages as copies.

    python benchmarks/cp_virtual.py --json rows.json
    python benchmarks/cp_virtual.py --quick   # a minute; a CPU gets small sizes

Each member's out, lse, dq, dk and dv are compared with those of one kernel over the whole sequence before they are
rounded: its fp32 sums, or its fp64 results where inputs are fp32. The unit is the error of rounding these to the dtype,
and `lib/exact.py:FACTOR` units are allowed: a member may be as far from the one kernel as that from the exact result.
The sequence is compared in 16 parts and the worst counts, so that late tokens, whose gradients are small, are not lost
among early ones.

"tiles" is the time of the kernel calls of all ranks, on the slices that the executor makes and with its running
results, over the time of one kernel; members take turns in one run. It has no messages. The run in process has all
messages, each a copy, and is timed once; memory is its peak beyond its inputs. The exit status is 1 when a result is
wrong.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib.cases import Case, inputs
from lib.exact import compared
from lib.script import Row, Size, about, make_parser, make_table, write_record
from lib.sections import NO_TIME
from lib.timing import LEAST_ROUNDS, Phase, elapsed_ms, interleaved_ms, moment, synchronize
from lib.virtual_ranks import RESULTS, Tiles, Trial, Whole, backward_in_process, forward_in_process, grid_of, joined
from rich.console import Console
from torch import Tensor

BAR = 1.05
"""Largest time of all tiles of all ranks, as a multiple of one kernel over the whole sequence."""
PARTS = 16
WARM_TOKENS = 256
"""Tokens of a rank in the run that compiles the kernels before the clock starts."""
ALL = ("token_ring", "ring", "grid", "hybrid", "ulysses")


def trials(device: str, size: Size) -> list[Trial]:
    """Return the trials, the most important first.

    On a GPU every length from 128k to 1M tokens and every number of ranks from 2 to 16 is there, the longer the fewer
    heads: a head of a million tokens takes 4.5 s forward and backward at 300 and 200 TFLOP/s.
    """
    if size == "smallest":
        return [Trial(Case("documents", 256, 1, 4, 2, 32, "float32"), 4, ALL)]
    if device == "cpu":
        cpu = [Trial(Case(mask, 2048, 1, 4, 2, 64, "float32"), 4, ALL) for mask in ("causal", "documents", "window")]
        more = [Trial(Case("causal", 4096, 1, 8, heads, 64, "float32"), size, ALL) for heads, size in ((8, 2), (2, 8))]
        return cpu + more if size == "full" else cpu

    def trial(mask: str, k_tokens: int, heads: int, kv_heads: int, size: int, members: tuple[str, ...]) -> Trial:
        return Trial(Case(mask, k_tokens * 1024, 1, heads, kv_heads, 128, "bfloat16"), size, members)

    found = [
        trial("causal", 128, 8, 8, 8, ALL),
        trial("documents", 128, 8, 2, 8, ALL),
        trial("window", 128, 8, 2, 8, ALL),
    ]
    if size == "quick":
        return found
    without_heads = tuple(member for member in ALL if member != "ulysses")  # which takes a head a rank
    return [
        *found,
        trial("causal", 128, 4, 1, 2, ("token_ring", "ring", "ulysses")),
        trial("causal", 256, 2, 2, 4, without_heads),
        trial("causal", 1024, 1, 1, 16, ("token_ring", "grid")),
        trial("causal", 512, 1, 1, 8, without_heads),
    ]


def worst(got: dict[str, Tensor], truth: dict[str, Tensor], q: Tensor) -> Row:
    """Return the errors of the worst of `PARTS` parts of the sequence, as `lib.exact.compared` counts them."""
    found = []
    for start in range(0, q.shape[1], q.shape[1] // PARTS):
        part = slice(start, start + q.shape[1] // PARTS)
        mine, exact = (
            {name: x[:, :, part] if name == "lse" else x[:, part] for name, x in whole.items()}
            for whole in (got, truth)
        )
        found.append(compared("", mine, exact, q[:, part]))
    errors = {name: max((row[name] for row in found), key=lambda x: (x != x, x)) for name in RESULTS}  # nan is worst
    limits = {f"{name}_limit": found[0][f"{name}_limit"] for name in RESULTS}
    return errors | limits | {"right": all(row["right"] for row in found)}


def in_process_row(spec: Any, truth: dict[str, Tensor], tensors: tuple[Tensor, ...], device: str) -> Row:
    """Return the row of one forward and backward of all ranks, with their messages."""
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


def trial_rows(trial: Trial, device: str, backend: str, deadline: float) -> list[Row]:
    """Return a row of every member: its errors, and its times beside one kernel's."""
    tensors = tuple(x.detach() for x in inputs(trial.case, device))
    whole = Whole(trial, device, backend, tensors)
    started = time.time()
    wider = tuple(x.double() for x in tensors) if tensors[0].dtype == torch.float32 else tensors
    truth = Whole(trial, device, backend, wider).results()
    synchronize(device)
    fitting = [member for member in trial.members if trial.unfit(member) is None]
    # The one pass just made tells what the rest takes.
    if time.time() + (num_passes(len(fitting), device) - 1) * (time.time() - started) > deadline:
        return no_time(trial)
    phases: dict[str, list[Phase]] = {"one kernel": [whole.forward, whole.backward]}
    found: dict[str, Row] = {}
    pairs = whole.mask.num_pairs * trial.case.heads
    for member in fitting:
        spec = trial.spec(member, backend)
        tiles = Tiles(spec, device, tensors)  # first, since it makes the masks, which training makes once as well
        phases[member] = [tiles.forward, tiles.backward]
        found[member] = in_process_row(spec, truth, tensors, device)
        found[member]["right"] &= all(tiles.num_pairs(direction) == pairs for direction in tiles.calls)
    del truth
    times = interleaved_ms(phases, device)
    one = times["one kernel"]
    rows = []
    for member in trial.members:
        if member not in found:
            note = f"left out: {trial.unfit(member)}"
            rows.append(known(trial, member) | {"right": None, "note": note})
            continue
        row = found[member]
        in_process = [row.pop("in_process_forward_ms"), row.pop("in_process_backward_ms")]
        for at, direction in enumerate(("forward", "backward")):
            row[f"{direction}_ms"] = round(one[at], 3)
            row[f"tiles_{direction}"] = round(times[member][at] / one[at], 4)
            row[f"in_process_{direction}"] = round(in_process[at] / one[at], 4)
        rows.append(known(trial, member) | row | {"note": ""})
    return rows


def known(trial: Trial, member: str) -> Row:
    """Return the columns that name a row."""
    case = trial.case._asdict()
    del case["flex"]
    return case | {"ranks": trial.size, "member": member, "grid": str(grid_of(member, trial.size))}


def no_time(trial: Trial) -> list[Row]:
    """Return the rows of a trial that is left out for lack of time."""
    return [known(trial, member) | {"note": NO_TIME} for member in trial.members]


def num_passes(members: int, device: str) -> int:
    """Return the least number of times that a trial of some members computes its attention, forward and backward.

    Once by one kernel for comparison, once in process by each member, and in rounds by each member and the one kernel.
    """
    return 1 + members + LEAST_ROUNDS[device] * (members + 1)


def all_rows(device: str, backend: str, size: Size, deadline: float) -> Iterator[Row]:
    """Yield rows as trials end; those that would end after `deadline` (of `time.time`) say so."""
    for trial in trials(device, size):
        if time.time() > deadline:
            yield from no_time(trial)
            continue
        small = trial.case._replace(tokens=WARM_TOKENS * trial.size)
        if device == "cuda":  # kernels are compiled before the clock starts
            trial_rows(trial._replace(case=small), device, backend, float("inf"))
            torch.cuda.empty_cache()
        yield from trial_rows(trial, device, backend, deadline)


def bars(rows: list[Row]) -> list[Row]:
    """Return the bar of each pass with its worst member."""
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
    """Print a line for each member: its worst error over the limit, and its times over one kernel's."""
    columns = ("case", "member", "cp", "error", "fwd", "bwd", "fwd*", "bwd*", "GiB")
    title = "error: worst over its limit; fwd, bwd: tiles over one kernel; *: with messages"
    table = make_table(title, columns, left=("case", "member"))
    for row in rows:
        tokens = f"{row['tokens'] // 1024}k" if row["tokens"] % 1024 == 0 else row["tokens"]
        cells = [f"{row['mask']} {tokens} {row['heads']}/{row['kv_heads']}", row["member"], row["ranks"]]
        if row.get("right") is not None:
            errors = {name: row[name] / row[f"{name}_limit"] for name in RESULTS}
            name = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
            ratios = [row[f"{kind}_{way}"] for kind in ("tiles", "in_process") for way in ("forward", "backward")]
            peak = row["peak_bytes"]
            cells += [f"{errors[name]:.2f} {name}", *(f"{x:.4g}" for x in ratios)]
            cells.append("" if peak is None else f"{peak / 2**30:.1f}")
        table.add_row(*map(str, cells), style="red" if row.get("right") is False else None)
    console.print(table)
    for row in rows:
        if note := row["note"] or ("" if row["right"] else "WRONG"):
            console.print(f"{row['mask']} {row['tokens']}, {row['ranks']} ranks, {row['member']}: {note}")
    for bar in bars(rows):
        value = "" if bar["value"] is None else f"{bar['value']:.3f} ({bar['where']})"
        console.print(f"{bar['bar']}: {value} {bar['met']}", highlight=False)


def main() -> int:
    options = make_parser(__doc__ or "", quick="few cases, about a minute").parse_args()
    device, backend = ("cuda", "triton") if torch.cuda.is_available() else ("cpu", "torch_cpu")
    console = Console(width=100)
    console.print(about(device))
    rows: list[Row] = []
    with console.status("measuring"):
        for row in all_rows(device, backend, options.size, float("inf")):
            rows.append(row)
            write_record(options.json, {"rows": rows, "bars": bars(rows)}, device)
    show(rows, console)
    return 1 if any(row.get("right") is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
