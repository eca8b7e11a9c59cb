"""Sections of the attention backends: the speed of each beside all others, and tiles by the fastest of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from longring.kernels import choose
from longring.kernels.backends import BACKENDS, TASKS, Selection
from longring.kernels.blocks import architecture
from longring.kernels.case import Case
from longring.kernels.choose import Question, Sample
from longring.kernels.layout import SeqLayout
from rich.console import Console

from .cases import document_tokens
from .gpu_kernels import deadline
from .script import Row, Size, make_table
from .sections import NO_TIME

WINDOW = 1024
"""Attention window in tokens, of windowed tiles."""
PRODUCTS = {"forward": 2, "continued": 2, "backward": 5}
"""Products of each task, each of 2 x head dim FLOPs for a visible pair and head."""
LEFT_OUT = ("reference",)


class Bar(NamedTuple):
    """A goal for the speed of one backend over that of another, at causal tiles of 8,192 tokens and more."""

    backend: str
    """Its name; "chosen": the one that a run takes for all lengths, by `choose.fastest`."""
    over: str
    """Its name; "best": the fastest of each tile."""
    task: str
    least: float


BARS = (
    Bar("chosen", "flash_3", "forward", 1.0),
    Bar("chosen", "flash_3", "backward", 1.0),
    Bar("chosen", "best", "forward", 0.95),
    Bar("chosen", "best", "backward", 0.95),
    Bar("triton", "cudnn", "forward", 0.8),
    Bar("triton", "cudnn", "backward", 0.6),
)


def questions(device: str, size: Size) -> list[Question]:
    """Return a question for each ratio of heads; its samples have the tokens and masks.

    With 8 heads, a backend takes 8 s for all calls of 131,072 tokens at 300 TFLOP/s forward and 200 backward.
    """
    lengths = {"full": (2048, 8192, 32_768, 131_072), "quick": (8192,), "smallest": (128,)}[size]
    if device == "cpu":
        lengths = tuple(length for length in (128, 1024) if length <= lengths[0] // 2 or length == 128)
    tokens = max(lengths[0], min(16_384, lengths[-1]))
    found = []
    for length in lengths:
        whole, batch = SeqLayout.contiguous(length), max(1, tokens // length)
        found.append(Sample(batch, whole, whole, None, ("forward", "backward")))
        later = SeqLayout(((length, 2 * length),))
        found.append(Sample(1, later, whole, None, ("continued", "backward")))
    # Windows and documents at one length: a kernel's share of masked blocks does not depend on the rest.
    whole, packed = SeqLayout.contiguous(tokens), SeqLayout.packed(document_tokens(tokens))
    found.append(Sample(1, whole, whole, min(WINDOW, tokens // 4), ("forward", "backward")))
    found.append(Sample(1, packed, packed, None, ("forward", "backward")))
    if device == "cpu":
        return [Question(4, kv_heads, 32, torch.float32, tuple(found)) for kv_heads in (4, 2)]
    return [Question(8, kv_heads, 128, torch.bfloat16, tuple(found)) for kv_heads in (8, 1)]


def unfit(question: Question, device: torch.device) -> dict[str, str | None]:
    """Return why each backend cannot compute a question, or None."""
    case = Case(device.type, architecture(device), *(question.dtype, question.head_dim, question.num_kv_heads), False)
    return {name: backend.unfit(case) for name, backend in BACKENDS.items() if name not in LEFT_OUT}


def backends_rows(device: str, size: Size) -> Iterator[Row]:
    """Yield the speed of each backend that fits, by heads, mask, tokens and task; those of packages come last."""
    where, until = torch.device(device), deadline()
    for question in questions(device, size):
        heads = {"heads": question.num_heads, "kv_heads": question.num_kv_heads, "head_dim": question.head_dim}
        for name, reason in unfit(question, where).items():
            if reason is not None:
                yield {"backend": name, **heads, "note": f"{name}: {reason}"}
                continue
            for timing in choose.measure(question, name, where):
                sample = question.samples[timing.sample]
                yield {"backend": name, **heads} | _measured(timing, sample, question)
                if time.time() > until:
                    yield {"backend": name, "note": NO_TIME}
                    return


def _measured(timing: choose.Timing, sample: Sample, question: Question) -> Row:
    """Return the columns of one timing."""
    pairs = sample.mask(torch.device("cpu")).num_pairs * sample.batch * question.num_heads
    flops = 2 * PRODUCTS[timing.task] * question.head_dim * pairs
    return {
        "task": timing.task,
        "mask": timing.kind,
        "tokens": sample.queries.num_tokens,
        "batch": sample.batch,
        "ms": timing.seconds and round(1e3 * timing.seconds, 4),
        "tflops": timing.seconds and float(f"{flops / timing.seconds / 1e12:.4g}"),
        "right": timing.seconds is not None,
        "note": f"{timing.backend}, {timing.task} {timing.kind}: {timing.note}" if timing.note else "",
    }


def tiles_rows(device: str, size: Size) -> Iterator[Row]:
    """Yield the rows of benchmarks/cp_virtual.py with the fastest backend of each kind of tile."""
    import cp_virtual

    cpu, until, where = device == "cpu", deadline(), torch.device(device)
    tokens, shape = (64, (4, 2, 32, torch.float32)) if cpu else (8192, (16, 4, 128, torch.bfloat16))
    whole, later = SeqLayout.contiguous(tokens), SeqLayout(((tokens, 2 * tokens),))
    packed = SeqLayout.packed(document_tokens(tokens))
    sides: tuple[tuple[SeqLayout, SeqLayout, int | None], ...]
    sides = ((whole, whole, None), (later, whole, None), (whole, whole, tokens // 4), (packed, packed, None))
    question = Question(*shape, tuple(Sample(1, *side, TASKS) for side in sides))
    fitting = [name for name, reason in unfit(question, where).items() if reason is None]
    chosen = choose.fastest(timing for name in fitting for timing in choose.measure(question, name, where))
    backend = str(Selection("torch_cpu" if cpu else "triton", chosen))
    for row in cp_virtual.all_rows(device, backend, size, until):
        yield row | {"backend": backend}


def bars(rows: list[Row]) -> list[Row]:
    """Return the bars with their worst values; None where a row is missing."""
    causal = [row for row in rows if row.get("mask") == "causal"]
    chosen: dict[tuple[str, int, int], str] = {}  # task, heads, kv heads: what a run takes for all lengths
    for heads in dict.fromkeys((row["heads"], row["kv_heads"]) for row in causal):
        timings = [
            choose.Timing(row["task"], "causal", 0, row["backend"], row["ms"] and row["ms"] / 1e3, "")
            for row in causal
            if (row["heads"], row["kv_heads"]) == heads
        ]
        chosen |= {(task, *heads): name for (task, _), name in choose.fastest(timings).items()}
    speeds: dict[tuple[str, int, int, int], dict[str, float]] = {}
    for row in causal:
        if row["tflops"] and row["tokens"] >= 8192:
            case = (row["task"], row["heads"], row["kv_heads"], row["tokens"])
            speeds.setdefault(case, {})[row["backend"]] = row["tflops"]
    for case, of in speeds.items():
        of |= {"best": max(of.values()), "chosen": of.get(chosen.get(case[:3], ""), 0.0)}
    found = []
    for bar in BARS:
        of_task = [of for case, of in speeds.items() if case[0] == bar.task and bar.over in of]
        value = min((of.get(bar.backend, 0.0) / of[bar.over] for of in of_task), default=None)
        met = "no row" if value is None else "met" if value >= bar.least else "not met"
        text = f"causal {bar.task}, {bar.backend}: at least {bar.least} of {bar.over}"
        found.append({"bar": text, "value": value, "met": met})
    return found


def show(rows: list[Row], console: Console) -> None:
    """Print a line for each tile and task with the TFLOP/s of every backend, and the bars."""
    names = list(dict.fromkeys(row["backend"] for row in rows if "task" in row))
    columns = ("task", "mask", "tokens", "heads", *(name.replace("_", " ") for name in names))
    table = make_table("TFLOP/s of the attention backends", columns, left=("task", "mask"))
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        if "task" in row:
            tile = (row["task"], row["mask"], f"{row['tokens']:,}", f"{row['heads']}/{row['kv_heads']}")
            cells.setdefault(tile, {})[row["backend"]] = f"{row['tflops']:.3g}" if row["tflops"] else "NO"
    for tile, speeds in cells.items():
        table.add_row(
            *tile, *(speeds.get(name, "") for name in names), style="red" if "NO" in speeds.values() else None
        )
    console.print(table)
    for note in dict.fromkeys(row["note"] for row in rows if row.get("note")):
        console.print(note, markup=False, highlight=False)
    for bar in bars(rows):
        value = "" if bar["value"] is None else f"{bar['value']:.3f} "
        console.print(f"{bar['bar']}: {value}{bar['met']}", highlight=False)


def show_tiles(rows: list[Row], console: Console) -> None:
    """Print the chosen backends and the table of benchmarks/cp_virtual.py."""
    import cp_virtual

    for backend in dict.fromkeys(row["backend"] for row in rows):
        console.print(f"kernels: {backend}", markup=False, highlight=False)
    cp_virtual.show(rows, console)
