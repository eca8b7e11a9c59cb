"""Block sizes of the attention kernels for the GPU at hand, measured, into kernels/tuned.json.

    python benchmarks/tune_attention.py --json rows.json                  # all kernels, 16 and 32 bit, d 32 to 256
    python benchmarks/tune_attention.py --quick                           # 16 bit and d 128 alone, a minute or two
    python benchmarks/tune_attention.py --minutes 9 --dry                 # look, and leave the file as it is

Causal attention of 8,192 tokens. Each candidate first runs on a small input in a process beside, which fills Triton's
cache, and must give what the reference gives; then those that could are timed in turns, call by call. A new choice is
written where it is at least 2% faster than the old one. The kernels of the backward are tuned one after the other, each
timed as part of the whole backward. Entries of other architectures stay as they are.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels have no speed

sys.path.insert(0, str(Path(__file__).parent))  # scripts find each other even under PYTHONSAFEPATH
import torch
from lib import ROOT, cases
from longring.kernels import attention as front_door
from longring.kernels import blocks
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

TUNED = ROOT / "kernels" / "tuned.json"
KERNELS = ("forward", "backward_dkdv", "backward_dq")
HEAD_DIMS = (128, 64, 256, 32)
"""The most used first: a deadline cuts off the others. Head dims between run with the next larger one's entry."""
DTYPES = {16: torch.bfloat16, 32: torch.float32}
CANDIDATES = {
    16: (
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (128, 64, 4, 3),
        (128, 32, 4, 3), (64, 128, 8, 2), (64, 128, 8, 3), (64, 128, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3),
        (64, 64, 8, 2), (64, 64, 8, 3), (64, 32, 4, 2), (64, 32, 4, 3), (32, 64, 4, 2), (32, 64, 8, 2),
        (32, 128, 8, 2), (32, 128, 4, 2), (32, 32, 4, 2), (16, 64, 8, 2), (16, 128, 8, 2),
    ),
    32: (
        (64, 32, 8, 2), (64, 32, 4, 1), (64, 16, 4, 2), (32, 64, 8, 2), (32, 32, 8, 2), (32, 32, 4, 2),
        (32, 32, 4, 1), (32, 16, 4, 2), (32, 16, 4, 1), (16, 32, 4, 2), (16, 32, 4, 1), (16, 16, 4, 1),
    ),
}  # fmt: skip
"""Rows of queries, of keys, warps, stages."""
GAIN = 1.02
"""Less than this is noise, and the file should not change with it."""
SMALL_TOKENS = 512
ERROR = {16: 0.02, 32: 1e-4}
"""Relative to the largest element of the reference: a wrong kernel is wrong by far more."""


def choose(kernel: str, arch: str, bits: int, head_dim: int, at: tuple[int, ...]) -> None:
    """Let this process's kernels run with `at`: their table of blocks is data."""
    table = blocks.tuned_table()
    table.setdefault(arch, copy.deepcopy(table["sm_80"]))[kernel][f"{bits} bit"][str(head_dim)] = list(at)
    blocks.tuned.cache_clear()


def spread(arch: str) -> None:
    """Give every head dim an entry of its own, so that tuning one leaves the others as they are."""
    found = [
        (kernel, bits, head_dim, tuple(blocks.tuned(kernel, arch, bits // 8, head_dim)))
        for kernel in KERNELS
        for bits in CANDIDATES
        for head_dim in HEAD_DIMS
    ]
    for kernel, bits, head_dim, at in found:
        choose(kernel, arch, bits, head_dim, at)


def shared_bytes(kernel: str, bits: int, head_dim: int, at: tuple[int, ...]) -> int:
    """The least shared memory that a candidate can do with: what it walks over, once a stage."""
    block_m, block_n, _, num_stages = at
    walked = block_m if kernel == "backward_dkdv" else block_n
    return 2 * walked * head_dim * bits // 8 * num_stages


def case(tokens: int, bits: int, head_dim: int) -> Any:
    heads = max(8, 2048 // head_dim)
    return cases.Case("causal", tokens, 1, heads, heads, head_dim, str(DTYPES[bits]).removeprefix("torch."))


class Problem:
    """One case's tensors, and the two calls that are timed."""

    def __init__(self, tokens: int, bits: int, head_dim: int, device: str, backend: str = "triton") -> None:
        at = case(tokens, bits, head_dim)
        self.backend = backend
        self.mask = cases.mask_of(at, device)
        self.q, self.k, self.v, self.dout = (x.detach() for x in cases.inputs(at, device))
        self.out, self.lse = self.forward()
        self.delta = front_door.row_delta(self.dout, self.out)
        self.into = tuple(front_door.zeros_fp32(x) for x in (self.q, self.k, self.v))

    def forward(self) -> tuple[Tensor, Tensor]:
        """out and lse."""
        return front_door.attention_forward(self.q, self.k, self.v, self.mask, backend=self.backend)

    def backward(self) -> tuple[Tensor, ...]:
        """dq, dk, dv, to which each call adds."""
        front_door.attention_backward(
            self.dout, self.q, self.k, self.v, self.lse, self.delta, self.mask, into=self.into, backend=self.backend
        )
        return self.into


def try_candidate(kernel: str, arch: str, bits: int, head_dim: int, at: tuple[int, ...], device: str) -> str | None:
    """Why a candidate cannot be used, or None. Runs in a process beside; compiles what the timing will run."""
    try:
        choose(kernel, arch, bits, head_dim, at)
        got = Problem(SMALL_TOKENS, bits, head_dim, device)
        expected = Problem(SMALL_TOKENS, bits, head_dim, device, "reference")
        pairs = [(got.out, expected.out)]
        if kernel != "forward":
            pairs = list(zip(got.backward(), expected.backward(), strict=True))
        errors = [float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs]
    except Exception as error:  # out of shared memory, registers or patience of the compiler: each is a reason
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80] if str(error).strip() else ''}"
    # Not "any above": nan is above nothing.
    return None if all(error <= ERROR[bits] for error in errors) else f"wrong by {max(errors):.2g}"


def tuned_row(kernel: str, arch: str, bits: int, head_dim: int, fit: list[tuple[int, ...]], device: str) -> Any:
    """Time the old choice beside all that are fit, and leave the better one chosen."""
    old = tuple(blocks.tuned(kernel, arch, bits // 8, head_dim))
    problem = Problem(8192, bits, head_dim, device)
    direction = problem.forward if kernel == "forward" else problem.backward

    def run(_: Any, at: tuple[int, ...]) -> None:
        choose(kernel, arch, bits, head_dim, at)
        direction()

    members = {str(at): [partial(run, at=at)] for at in dict.fromkeys((old, *fit))}
    for phases in members.values():
        cases.warm_up(phases, device)
    times = {name: ms[0] for name, ms in cases.interleaved_ms(members, device, budget_s=2.0).items()}
    best = min(dict.fromkeys((old, *fit)), key=lambda at: times[str(at)])
    if times[str(old)] < GAIN * times[str(best)]:
        best = old
    choose(kernel, arch, bits, head_dim, best)
    return {
        "kernel": kernel,
        "bits": bits,
        "head_dim": head_dim,
        "fit": len(fit),
        "old": list(old),
        "old_ms": round(times[str(old)], 4),
        "new": list(best),
        "new_ms": round(times[str(best)], 4),
        "gain": round(times[str(old)] / times[str(best)], 3),
        "times_ms": {name: round(ms, 4) for name, ms in times.items()},
    }


def compact(entries: dict[str, list[int]]) -> dict[str, list[int]]:
    """Without the head dims that the next larger one's entry serves as well."""
    widths = sorted(entries, key=int)
    return {a: entries[a] for a, b in zip(widths, [*widths[1:], ""], strict=True) if entries[a] != entries.get(b)}


def written(table: dict[str, dict[str, dict[str, dict[str, list[int]]]]]) -> str:
    """The table as tuned.json holds it: a line for each kernel and element size."""
    archs = []
    for arch, kernels in table.items():
        parts = []
        for kernel, sizes in kernels.items():
            lines = [f'      "{size}": {json.dumps(compact(entries))}' for size, entries in sizes.items()]
            parts.append(f'    "{kernel}": {{\n' + ",\n".join(lines) + "\n    }")
        archs.append(f'  "{arch}": {{\n' + ",\n".join(parts) + "\n  }")
    return "{\n" + ",\n".join(archs) + "\n}\n"


def tune(jobs: list[tuple[str, int, int]], arch: str, limit_bytes: int, device: str, deadline: float) -> list[Any]:
    """A row for each (kernel, bits, head dim) that the time was enough for; trying may take half of it."""
    spread(arch)
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        tried = {
            (*job, at): pool.submit(try_candidate, *job[:1], arch, *job[1:], at, device)
            for job in jobs
            for at in CANDIDATES[job[1]]
            if shared_bytes(*job, at) <= limit_bytes
        }
        # All are tried before the first is timed: nothing else runs on the GPU then.
        wait(tried.values(), timeout=(deadline - time.monotonic()) / 2)
        pool.shutdown(cancel_futures=True)
    rows = []
    for job in track(jobs, "timing", console=Console(stderr=True), transient=True):
        candidates = {at: found for (*of, at), found in tried.items() if tuple(of) == job}
        if time.monotonic() > deadline or any(found.cancelled() or found.exception() for found in candidates.values()):
            continue
        reasons = {at: found.result() for at, found in candidates.items()}
        kernel, bits, head_dim = job
        row = tuned_row(kernel, arch, bits, head_dim, [at for at in reasons if reasons[at] is None], device)
        rows.append(row | {"unfit": {str(at): reason for at, reason in reasons.items() if reason}})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16 bit and head dim 128 alone")
    parser.add_argument("--minutes", type=float, default=9, help="start no tuning later than this (default: 9)")
    parser.add_argument("--dry", action="store_true", help="measure only: leave kernels/tuned.json as it is")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, with device and versions")
    options = parser.parse_args()
    console = Console(width=100)
    if not torch.cuda.is_available():
        Console(stderr=True).print("[bold red]error:[/] block sizes are measured on a GPU, and torch sees none here")
        return 2
    deadline = time.monotonic() + 60 * options.minutes
    arch = blocks.architecture(torch.device("cuda"))
    properties = torch.cuda.get_device_properties()
    limit_bytes = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    sizes = [(16, 128)] if options.quick else [(bits, head_dim) for bits in CANDIDATES for head_dim in HEAD_DIMS]
    jobs = [(kernel, *size) for size in sizes for kernel in KERNELS]
    console.print({**cases.about("cuda"), "architecture": arch})
    rows = tune(jobs, arch, limit_bytes, "cuda", deadline)
    table = Table(title="queries, keys, warps, stages", title_justify="left", box=box.SIMPLE_HEAD)
    columns = ("kernel", "bits", "head_dim", "fit", "old", "old_ms", "new", "new_ms", "gain")
    for column in columns:
        table.add_column(column, justify="left" if column == "kernel" else "right", no_wrap=True)
    for row in rows:
        cells = [", ".join(map(str, row[x])) if isinstance(row[x], list) else str(row[x]) for x in columns]
        table.add_row(*cells, style="green" if row["new"] != row["old"] else None)
    console.print(table)
    done = {(row["kernel"], row["bits"], row["head_dim"]) for row in rows}
    if left_out := [" ".join(map(str, job)) for job in jobs if job not in done]:
        console.print(f"left out, for want of time or for a broken process: {', '.join(left_out)}", highlight=False)
    if options.json:
        options.json.write_text(
            json.dumps({**cases.about("cuda"), "architecture": arch, "rows": rows}, indent=1) + "\n"
        )
    if not options.dry and any(row["new"] != row["old"] for row in rows):
        TUNED.write_text(written(blocks.tuned_table()))
        console.print(f"wrote {TUNED}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
