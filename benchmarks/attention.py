"""Attention, forward and backward, of LongRing and of torch side by side in one run.

    python benchmarks/attention.py --json rows.json
    python benchmarks/attention.py --quick              # about a minute

On CUDA: our Triton kernels beside torch's flash (FlashAttention-2), cuDNN, efficient and FlexAttention; the cost of
continuing a running result; bandwidth of the merge and delta kernels. On a CPU: `torch_cpu` beside torch's
scaled_dot_product_attention. Members take turns call by call, so that a slow moment of the machine meets all of them;
times are medians, a ratio is the member's time over ours, so above 1 ours is faster. FLOPs are those of the visible
pairs of query and key: 2 products forward, 5 backward, each 2 x head dim x pairs x heads. Memory is the peak of a
forward and backward beyond its inputs. A member that cannot do a case has a row that says why.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))  # scripts find each other even under PYTHONSAFEPATH
from lib.cases import Case, Phase, Row, about, inputs, interleaved_ms, layout_of, mask_of, plan, warm_up
from longring.kernels import attention as front_door
from longring.kernels import merge
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

PRODUCTS = {"forward": 2, "backward": 5, "both": 7}


class Bar(NamedTuple):
    """A promise about ratios; where several rows fit, the worst counts."""

    text: str
    where: dict[str, object]
    least: float | None = None
    below: float | None = None


AT_16K = {"mask": "causal", "tokens": 16384, "head_dim": 128}
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


def ours(case: Case, device: str, backend: str) -> Callable[..., Tensor]:
    return partial(front_door.attention, mask=mask_of(case, device), backend=backend)


def sdpa(case: Case, device: str, backend: SDPBackend | None) -> Callable[..., Tensor]:
    """torch's scaled_dot_product_attention, by one of its operators, or by its own choice."""
    where = mask_of(case, device).rows.unsqueeze(-1) if case.mask == "documents" else None
    keys = torch.arange(case.tokens, device=device)
    options = {
        "attn_mask": None if where is None else (keys >= where[0]) & (keys < where[1]),
        "is_causal": case.mask == "causal",
        "enable_gqa": case.kv_heads != case.heads,
    }

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    return call


def flex(case: Case, device: str) -> Callable[..., Tensor]:
    """FlexAttention, compiled for this case alone; its block mask is made before the clock starts."""
    starts = torch.tensor(layout_of(case).document_starts)
    document = (torch.searchsorted(starts, torch.arange(case.tokens), right=True) - 1).to(device)

    def is_causal(b, h, i, j):
        return i >= j

    def in_one_document(b, h, i, j):
        return (i >= j) & (document[i] == document[j])

    visible = {"causal": is_causal, "documents": in_one_document}.get(case.mask)
    blocks = visible and create_block_mask(visible, None, None, case.tokens, case.tokens, device=device)
    torch.compiler.reset()  # past a number of shapes torch would stop compiling
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=blocks, enable_gqa=case.kv_heads != case.heads).transpose(1, 2)

    return call


def unfit(member: str, case: Case) -> str | None:
    """Why a member is not asked, where that is known beforehand."""
    if member in ("flash", "cudnn", "efficient") and case.mask == "documents":
        return "knows documents as a dense mask only, or not at all"
    if member == "efficient" and case.kv_heads != case.heads:
        return "no grouped heads"
    if member == "efficient" and case.tokens > 32768:
        return "left out above 32,768 tokens, where it would take most of the run"
    if member == "flex" and not case.flex:
        return "timed in some cases only: each is a compilation of its own"
    return None


def members_of(case: Case, device: str, backend: str) -> dict[str, Callable[[], Callable[..., Tensor]]]:
    """What makes each member's function, ours first."""
    found: dict[str, Callable[[], Callable[..., Tensor]]] = {"ours": partial(ours, case, device, backend)}
    if backend == "torch_cpu":
        name = "sdpa, dense mask" if case.mask == "documents" else "sdpa"
        return found | {name: partial(sdpa, case, device, None)}
    operators = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    found |= {name: partial(sdpa, case, device, operator) for name, operator in operators.items()}
    return found | {"flex": partial(flex, case, device)}


def case_rows(case: Case, device: str, backend: str) -> list[Row]:
    """Forward, backward and both, of all members."""
    q, k, v, dout = inputs(case, device)
    notes: dict[str, str] = {}
    peaks: dict[str, int | None] = {}
    ready: dict[str, list[Phase]] = {}
    makers = members_of(case, device, backend)
    for name, make in makers.items():
        if (reason := unfit(name, case)) is not None:
            notes[name] = reason
            continue
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
            synchronize_after_failure(device)
    times = interleaved_ms(ready, device) if ready else {}
    work = 2 * case.head_dim * mask_of(case, device).num_pairs * case.heads * case.batch
    rows = []
    for index, (direction, products) in enumerate(PRODUCTS.items()):
        base = times["ours"][index] if "ours" in times else None
        for name in makers:
            ms = times[name][index] if name in times else None
            rows.append(row(case, direction, name, ms, base, products * work, peaks.get(name), notes.get(name)))
    return rows


def synchronize_after_failure(device: str) -> None:
    """Out of memory leaves blocks behind that the next member may need."""
    if device == "cuda":
        torch.cuda.empty_cache()


def row(
    case: Case, direction: str, member: str, ms: float | None, base_ms: float | None, flops: int | None = None,
    peak_bytes: int | None = None, note: str | None = None, moved_bytes: int | None = None,
) -> Row:  # fmt: skip
    """One line of the JSON file; base_ms is our time."""
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
    """The same tile from nothing, and added to a running result that already holds one."""
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
    """Kernels that read and write once, beside a copy of torch's: bytes over time."""
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
    """Rows as they are measured; a case later than `deadline` (of `time.time`) gives one that says so."""
    for number, case in enumerate(cases):
        if time.time() > deadline:
            yield row(case, "both", "ours", None, None, note="left out: the time was spent")
            continue
        yield from case_rows(case, device, backend)
        if backend == "triton" and number == 0:
            yield from continuing_rows(case, device, backend)
            yield from continuing_rows(case._replace(mask="full"), device, backend)
            yield from bandwidth_rows(case, device)


def bars(rows: list[Row]) -> list[Row]:
    """Each bar with the worst ratio of the rows it speaks of."""
    found = []
    for bar in BARS:
        fits = [r for r in rows if all(r[key] == wanted for key, wanted in bar.where.items())]
        ratios = [r["ratio"] for r in fits if r["ratio"] is not None]
        value = (max if bar.below else min)(ratios) if ratios else None
        met = value is not None and (value < bar.below if bar.below else value >= bar.least)
        found.append({"bar": bar.text, "value": value, "met": "no row" if value is None else ("not met", "met")[met]})
    return found


def show(rows: list[Row], console: Console) -> None:
    """One line for each case and direction; then why cells are empty; then the kernels beside attention; the bars."""
    side_by_side = [r for r in rows if r["direction"] in PRODUCTS]
    others = list(dict.fromkeys(r["member"] for r in side_by_side if r["member"] != "ours"))
    table = Table(
        title="Under a member: its time over ours, or its peak memory over ours", title_justify="left",
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for name in ("mask", "dtype", "tokens", "heads", "d", "", "ours ms", "TFLOP/s", *others):
        table.add_column(name, justify="left" if name in ("mask", "dtype", "") else "right", overflow="fold")
    by_case: dict[tuple, dict[str, dict[str, Row]]] = {}
    for r in side_by_side:
        key = (r["mask"], r["dtype"], r["tokens"], r["batch"], r["heads"], r["kv_heads"], r["head_dim"])
        by_case.setdefault(key, {}).setdefault(r["direction"], {})[r["member"]] = r
    for (mask, dtype, tokens, _, heads, kv_heads, head_dim), directions in by_case.items():
        start = [mask, dtype.replace("float", "fp").replace("bfp", "bf"), str(tokens), f"{heads}/{kv_heads}"]
        for direction, members in directions.items():
            own = members["ours"]
            ratios = [members[name]["ratio"] if name in members else None for name in others]
            cells = ["" if x is None else f"{x:.2f}" for x in ratios]
            ours_ms, tflops = ("" if own[x] is None else f"{own[x]:.4g}" for x in ("ms", "tflops"))
            table.add_row(*start, str(head_dim), direction, ours_ms, tflops, *cells)
        if base := own["peak_bytes"]:
            peaks = [members[name]["peak_bytes"] if name in members else None for name in others]
            cells = ["" if x is None else f"{x / base:.2f}" for x in peaks]
            table.add_row(*start, str(head_dim), "memory", f"{base / 2**20:.0f} MiB", "", *cells)
    console.print(table)
    for name, note in dict.fromkeys((r["member"], r["note"]) for r in rows if r["note"]):
        count = len({tuple(r[x] for x in Case._fields[:-1]) for r in rows if (r["member"], r["note"]) == (name, note)})
        console.print(f"{name}, {count} cases: {note}", markup=False, highlight=False)
    for r in rows:
        if r["direction"] not in PRODUCTS:
            speed = f"{r['gb_per_s']:.0f} GB/s" if r["gb_per_s"] else f"{r['ratio']:.3f} of ours"
            console.print(f"{r['direction']}, {r['mask']}: {r['member']} {r['ms']:.3f} ms, {speed}", highlight=False)
    table = Table(title="Bars", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("bar", "value", "met"):
        table.add_column(name, justify="left" if name == "bar" else "right")
    for bar in bars(rows):
        table.add_row(bar["bar"], "" if bar["value"] is None else f"{bar['value']:.3f}", bar["met"])
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few cases, about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, with device and versions")
    options = parser.parse_args()
    cases, device, backend = plan(options.quick)
    console = Console(width=100)
    console.print(about(device))
    with console.status("measuring"):
        rows = list(all_rows(cases, device, backend, deadline=float("inf")))
    show(rows, console)
    if options.json:
        options.json.write_text(json.dumps({**about(device), "rows": rows, "bars": bars(rows)}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
