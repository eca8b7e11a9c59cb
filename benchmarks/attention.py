"""Speed of attention, forward and backward, beside torch's own in the same run.

    python benchmarks/attention.py --json rows.json
    python benchmarks/attention.py --quick   # about a minute

On CUDA: the Triton kernels beside torch's flash (FlashAttention-2), cuDNN, efficient and FlexAttention; the cost of
continuing a running result; the bandwidth of the merge and delta kernels. On a CPU: `torch_cpu` beside torch's
scaled_dot_product_attention.

Members take turns call by call, so that a slow moment of the machine meets all of them. Times are medians. A ratio is
the member's time over ours: above 1 ours is faster. FLOPs count the visible pairs of query and key: 2 products forward
and 5 backward, each 2 x head dim x pairs x heads. Memory is the peak of a forward and backward beyond their inputs. A
member that cannot do a case has a row that says why.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib.attention_members import members_of, unfit
from lib.cases import Case, cases_here, inputs, mask_of
from lib.script import Row, about, make_parser, make_table, write_record
from lib.sections import NO_TIME
from lib.timing import Phase, interleaved_ms, warm_up
from longring.kernels import attention as front_door
from longring.kernels import merge
from rich.console import Console

PRODUCTS = {"forward": 2, "backward": 5, "both": 7}


class Bar(NamedTuple):
    """A goal for a ratio; where several rows fit, the worst counts."""

    text: str
    where: dict[str, Any]
    """Values of the rows that the bar is about."""
    least: float | None = None
    below: float | None = None


AT_16K: dict[str, Any] = {"mask": "causal", "tokens": 16384, "head_dim": 128}
BARS = (
    Bar("causal 16k d128, forward: at least 1.15 x flash", AT_16K | {"member": "flash", "direction": "forward"}, 1.15),
    Bar("causal 16k d128, forward: at least 0.80 x cuDNN", AT_16K | {"member": "cudnn", "direction": "forward"}, 0.80),
    Bar("causal 16k d128, backward: at least 1.0 x flash", AT_16K | {"member": "flash", "direction": "backward"}, 1.0),
    *(
        Bar(
            f"packed documents, {direction}: at least 1.5 x FlexAttention",
            {"mask": "documents", "member": "flex", "direction": direction},
            1.5,
        )
        for direction in ("forward", "backward")
    ),
    Bar("causal 16k, continuing a result: below 1.03 of not", AT_16K | {"member": "ours, running"}, below=1.03),
    Bar("CPU, forward and backward: at least 0.9 x torch", {"member": "sdpa", "direction": "both"}, 0.9),
)


def case_rows(case: Case, device: str, backend: str) -> list[Row]:
    """Return the rows of all members: forward, backward and both."""
    q, k, v, dout = inputs(case, device)
    notes: dict[str, str] = {}
    peaks: dict[str, int | None] = {}
    ready: dict[str, list[Phase]] = {}
    makers = members_of(case, device, backend)
    for name, make in makers.items():
        if (reason := unfit(name, case)) is not None:
            notes[name] = reason
            continue
        told: list[warnings.WarningMessage] = []
        try:
            with warnings.catch_warnings(record=True) as told:  # SDPA says in warnings why an operator is not fit
                warnings.simplefilter("always")
                call = make()
                phases = [lambda _, call=call: call(q, k, v), lambda out: torch.autograd.grad(out, (q, k, v), dout)]
                peaks[name] = warm_up(phases, device)
            ready[name] = phases
        except Exception as error:  # a member of torch's may fail in any way; the others go on
            texts = [str(error), *(str(warning.message) for warning in told)]
            first_lines = [text.strip().split("\n")[0].split(" (Triggered")[0] for text in texts if text.strip()]
            notes[name] = f"{type(error).__name__}: {'; '.join(dict.fromkeys(first_lines))[:400]}"
            if device == "cuda":
                torch.cuda.empty_cache()  # running out of memory leaves blocks that the next member may need
    times = interleaved_ms(ready, device) if ready else {}
    flops = 2 * case.head_dim * mask_of(case, device).num_pairs * case.heads * case.batch
    rows = []
    for index, (direction, products) in enumerate(PRODUCTS.items()):
        base = times["ours"][index] if "ours" in times else None
        for name in makers:
            ms = times[name][index] if name in times else None
            rows.append(row(case, direction, name, ms, base, products * flops, peaks.get(name), notes.get(name)))
    return rows


def row(
    case: Case, direction: str, member: str, ms: float | None, base_ms: float | None, flops: int | None = None,
    peak_bytes: int | None = None, note: str | None = None, moved_bytes: int | None = None,
) -> Row:  # fmt: skip
    """Return a row of the record; `base_ms` is our time."""
    known = case._asdict()
    del known["flex"]
    return known | {
        "direction": direction,
        "member": member,
        "ms": ms and round(ms, 4),
        "tflops": float(f"{flops / ms / 1e9:.4g}") if ms and flops else None,
        "gb_per_s": round(moved_bytes / ms / 1e6, 1) if ms and moved_bytes else None,
        "ratio": round(ms / base_ms, 3) if ms and base_ms else None,
        "peak_bytes": peak_bytes,
        "note": note or "",
    }


def continuing_rows(case: Case, device: str, backend: str) -> list[Row]:
    """Return the rows of a tile computed from nothing, and of one added to a running result."""
    mask = mask_of(case, device)
    q, k, v, _ = (x.detach() for x in inputs(case, device))
    running = front_door.attention_forward(q, k, v, mask, running=front_door.no_result(q), backend=backend)

    def forward(_: Any, running: Any = None) -> Any:
        return front_door.attention_forward(q, k, v, mask, running=running, backend=backend)

    phases = {"ours": [forward], "ours, running": [partial(forward, running=running)]}
    for member in phases.values():
        warm_up(member, device)
    times = interleaved_ms(phases, device)
    flops = 2 * PRODUCTS["forward"] * case.head_dim * mask.num_pairs * case.heads * case.batch
    base = times["ours"][0]
    return [row(case, "continuing", name, ms[0], base, flops) for name, ms in times.items()]


def bandwidth_rows(case: Case, device: str) -> list[Row]:
    """Return the bandwidth of the kernels that read and write once, beside a copy by torch."""
    q = inputs(case, device)[0].detach()
    out, lse = torch.randn(q.shape, device=device), torch.randn((case.batch, case.heads, case.tokens), device=device)
    parts, part_lses, dout = q.unsqueeze(0), lse.unsqueeze(0).clone(), q.clone()
    kept = torch.empty_like(out)
    members: dict[str, tuple[int, Phase]] = {
        "copy of torch": (2 * out.nbytes, lambda _: kept.copy_(out)),
        "merge": (2 * out.nbytes + q.nbytes + 3 * lse.nbytes, lambda _: merge.merge_(out, lse, parts, part_lses)),
        "delta": (2 * q.nbytes + lse.nbytes, lambda _: front_door.row_delta(dout, q)),
    }
    for _, phase in members.values():
        warm_up([phase], device)
    times = interleaved_ms({name: [phase] for name, (_, phase) in members.items()}, device)
    return [
        row(case, "bandwidth", name, times[name][0], None, moved_bytes=num_bytes)
        for name, (num_bytes, _) in members.items()
    ]


def all_rows(cases: list[Case], device: str, backend: str, deadline: float) -> Iterator[Row]:
    """Yield rows as they are measured; a case after `deadline` (of `time.time`) gives one that says so."""
    for number, case in enumerate(cases):
        if time.time() > deadline:
            yield row(case, "both", "ours", None, None, note=NO_TIME)
            continue
        yield from case_rows(case, device, backend)
        if backend == "triton" and number == 0:
            yield from continuing_rows(case, device, backend)
            yield from continuing_rows(case._replace(mask="full"), device, backend)
            yield from bandwidth_rows(case, device)


def bars(rows: list[Row]) -> list[Row]:
    """Return each bar with the worst ratio of its rows."""
    found = []
    for bar in BARS:
        fits = [r for r in rows if all(r[key] == wanted for key, wanted in bar.where.items())]
        ratios = [r["ratio"] for r in fits if r["ratio"] is not None]
        value = (max if bar.below else min)(ratios) if ratios else None
        met = value is not None and (value < bar.below if bar.below else value >= (bar.least or 0.0))
        found.append({"bar": bar.text, "value": value, "met": "no row" if value is None else ("not met", "met")[met]})
    return found


def show(rows: list[Row], console: Console) -> None:
    """Print a line for each case and direction, the reasons of empty cells, the other kernels, and the bars."""
    side_by_side = [r for r in rows if r["direction"] in PRODUCTS]
    others = list(dict.fromkeys(r["member"] for r in side_by_side if r["member"] != "ours"))
    columns = ("case", "", "ours ms", "TFLOP/s", *others)
    title = "Under a member: its time over ours, or its peak memory over ours"
    table = make_table(title, columns, left=("case", ""))
    by_case: dict[tuple, dict[str, dict[str, Row]]] = {}
    for r in side_by_side:
        key = (r["mask"], r["dtype"], r["tokens"], r["batch"], r["heads"], r["kv_heads"], r["head_dim"])
        by_case.setdefault(key, {}).setdefault(r["direction"], {})[r["member"]] = r
    for (mask, dtype, tokens, _, heads, kv_heads, head_dim), directions in by_case.items():
        dtype = dtype.replace("float", "fp").replace("bfp", "bf")
        # Over the rows of its directions.
        start = iter((f"{mask} {tokens:,}", f"  {dtype} {heads}/{kv_heads} x {head_dim}", "", ""))
        for direction, members in directions.items():
            own = members["ours"]
            ratios = [members[name]["ratio"] if name in members else None for name in others]
            cells = ["" if x is None else f"{x:.2f}" for x in ratios]
            ours_ms, tflops = ("" if own[x] is None else f"{own[x]:.4g}" for x in ("ms", "tflops"))
            table.add_row(next(start), direction, ours_ms, tflops, *cells)
        members = directions["both"]
        if base := members["ours"]["peak_bytes"]:
            peaks = [members[name]["peak_bytes"] if name in members else None for name in others]
            cells = ["" if x is None else f"{x / base:.2f}" for x in peaks]
            table.add_row(next(start), "memory", f"{base / 2**20:.0f} MiB", "", *cells)
    console.print(table)
    for name, note in dict.fromkeys((r["member"], r["note"]) for r in rows if r["note"]):
        count = len({tuple(r[x] for x in Case._fields[:-1]) for r in rows if (r["member"], r["note"]) == (name, note)})
        console.print(f"{name}, {count} cases: {note}", markup=False, highlight=False)
    for r in rows:
        if r["direction"] not in PRODUCTS:
            speed = f"{r['gb_per_s']:.0f} GB/s" if r["gb_per_s"] else f"{r['ratio']:.3f} of ours"
            console.print(f"{r['direction']}, {r['mask']}: {r['member']} {r['ms']:.3f} ms, {speed}", highlight=False)
    table = make_table("Bars", ("bar", "value", "met"), left=("bar",))
    for bar in bars(rows):
        table.add_row(bar["bar"], "" if bar["value"] is None else f"{bar['value']:.3f}", bar["met"])
    console.print(table)


def main() -> int:
    options = make_parser(__doc__ or "", quick="few cases, about a minute").parse_args()
    cases, device, backend = cases_here(options.size)
    console = Console(width=100)
    console.print(about(device))
    with console.status("measuring"):
        rows = list(all_rows(cases, device, backend, deadline=float("inf")))
    show(rows, console)
    write_record(options.json, {"rows": rows, "bars": bars(rows)}, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
