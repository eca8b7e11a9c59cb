"""Measure the fastest block sizes of the attention kernels on this GPU and write them into kernels/tuned.json.

    python benchmarks/tune_attention.py --json rows.json
    python benchmarks/tune_attention.py --quick             # a minute or two
    python benchmarks/tune_attention.py --minutes 9 --dry   # leaves the file

Needs a GPU. Causal attention of 8,192 tokens, all kernels, 16 and 32 bit, head dims 32 to 256. Each candidate first
runs on a small input in a process of its own, which fills Triton's cache, and must give the reference's result; then
all that do are timed in turns, call by call. A new choice is written where it is at least 2% faster than the old one.
The kernels of the backward are tuned one after the other, each timed as part of the whole backward. Entries of other
architectures stay as they are.
"""

from __future__ import annotations

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

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
import torch
from lib import ROOT, timing
from lib.cases import Case, inputs, mask_of
from lib.script import Row, about, make_parser, make_table, refuse, write_record
from longring.kernels import attention as front_door
from longring.kernels import blocks
from rich.console import Console
from rich.progress import track
from torch import Tensor

TUNED = ROOT / "kernels" / "tuned.json"
KERNELS = ("forward", "backward_dkdv", "backward_dq")
HEAD_DIMS = (128, 64, 256, 32)
"""The most used first: a deadline cuts off the others. Head dims between run with the next larger one's entry."""
DTYPES = {16: torch.bfloat16, 32: torch.float32}
CANDIDATES = {
    16: (
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (128, 64, 4, 3),
        (128, 32, 4, 2), (128, 32, 4, 3), (64, 128, 8, 2), (64, 128, 8, 3), (64, 128, 4, 2), (64, 64, 4, 2),
        (64, 64, 4, 3), (64, 64, 8, 2), (64, 64, 8, 3), (64, 32, 4, 2), (64, 32, 4, 3), (32, 64, 4, 2),
        (32, 64, 8, 2), (32, 128, 8, 2), (32, 128, 4, 2), (32, 32, 4, 2), (16, 64, 8, 2), (16, 128, 8, 2),
    ),
    32: (
        (64, 32, 8, 2), (64, 32, 4, 1), (64, 16, 4, 2), (32, 64, 8, 2), (32, 32, 8, 2), (32, 32, 4, 2),
        (32, 32, 4, 1), (32, 16, 4, 2), (32, 16, 4, 1), (16, 32, 4, 2), (16, 32, 4, 1), (16, 16, 4, 1),
    ),
}  # fmt: skip
"""Rows of queries, rows of keys, warps and stages."""
GAIN = 1.02
"""Least gain that changes the file; less is noise."""
SMALL_TOKENS = 512
ERROR = {16: 0.02, 32: 1e-4}
"""Allowed error relative to the largest element of the reference; a wrong kernel is wrong by far more."""


def choose(kernel: str, arch: str, bits: int, head_dim: int, at: tuple[int, ...]) -> None:
    """Let the kernels of this process run with the block sizes `at`."""
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
    """Return the least shared memory of a candidate: the rows that it walks over, once a stage."""
    block_m, block_n, _, num_stages = at
    walked = block_m if kernel == "backward_dkdv" else block_n
    return 2 * walked * head_dim * bits // 8 * num_stages


def case(tokens: int, bits: int, head_dim: int) -> Case:
    """Return the attention that is timed."""
    heads = max(8, 2048 // head_dim)
    return Case("causal", tokens, 1, heads, heads, head_dim, str(DTYPES[bits]).removeprefix("torch."))


class Problem:
    """One case's tensors, and the two calls that are timed."""

    def __init__(self, tokens: int, bits: int, head_dim: int, device: str, backend: str = "triton") -> None:
        at = case(tokens, bits, head_dim)
        self.backend = backend
        self.mask = mask_of(at, device)
        self.q, self.k, self.v, self.dout = (x.detach() for x in inputs(at, device))
        self.out, self.lse = self.forward()
        self.delta = front_door.row_delta(self.dout, self.out)
        zeros = front_door.zeros_fp32
        self.into = (zeros(self.q), zeros(self.k), zeros(self.v))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return out and lse."""
        return front_door.attention_forward(self.q, self.k, self.v, self.mask, backend=self.backend)

    def backward(self) -> tuple[Tensor, ...]:
        """Return dq, dk and dv, to which each call adds."""
        front_door.attention_backward(
            self.dout, self.q, self.k, self.v, self.lse, self.delta, self.mask, into=self.into, backend=self.backend
        )
        return self.into


def try_candidate(kernel: str, arch: str, bits: int, head_dim: int, at: tuple[int, ...], device: str) -> str | None:
    """Return why a candidate cannot be used, or None; in a process of its own, this compiles the timed kernels."""
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


def tuned_row(kernel: str, arch: str, bits: int, head_dim: int, fit: list[tuple[int, ...]], device: str) -> Row:
    """Time the old choice beside all usable candidates, choose the fastest, and return the row."""
    old = tuple(blocks.tuned(kernel, arch, bits // 8, head_dim))
    problem = Problem(8192, bits, head_dim, device)
    direction = problem.forward if kernel == "forward" else problem.backward

    def run(_: Any, at: tuple[int, ...]) -> None:
        choose(kernel, arch, bits, head_dim, at)
        direction()

    members = {str(at): [partial(run, at=at)] for at in dict.fromkeys((old, *fit))}
    for phases in members.values():
        timing.warm_up(phases, device)
    times = {name: ms[0] for name, ms in timing.interleaved_ms(members, device, budget_s=2.0).items()}
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
    """Return the entries without head dims that have the same entry as the next larger one."""
    widths = sorted(entries, key=int)
    return {a: entries[a] for a, b in zip(widths, [*widths[1:], ""], strict=True) if entries[a] != entries.get(b)}


def written(table: dict[str, dict[str, dict[str, dict[str, list[int]]]]]) -> str:
    """Return the text of tuned.json: a line for each kernel and element size."""
    archs = []
    for arch, kernels in table.items():
        parts = []
        for kernel, sizes in kernels.items():
            lines = [f'      "{size}": {json.dumps(compact(entries))}' for size, entries in sizes.items()]
            parts.append(f'    "{kernel}": {{\n' + ",\n".join(lines) + "\n    }")
        archs.append(f'  "{arch}": {{\n' + ",\n".join(parts) + "\n  }")
    return "{\n" + ",\n".join(archs) + "\n}\n"


def tune(jobs: list[tuple[str, int, int]], arch: str, limit_bytes: int, device: str, deadline: float) -> list[Row]:
    """Tune each (kernel, bits, head dim) before the deadline and return its row; trying may take half of the time."""
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
    parser = make_parser(__doc__ or "", quick="16 bit and head dim 128 alone: a minute or two")
    parser.add_argument("--minutes", type=float, default=9, help="start no tuning later than this (default: 9)")
    parser.add_argument("--dry", action="store_true", help="measure only: leave kernels/tuned.json as it is")
    options = parser.parse_args()
    console = Console(width=100)
    if not torch.cuda.is_available():
        return refuse("no GPU: block sizes are measured on one; run this command on a machine where torch sees it")
    deadline = time.monotonic() + 60 * options.minutes
    arch = blocks.architecture(torch.device("cuda"))
    properties = torch.cuda.get_device_properties()
    limit_bytes = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    sizes = (
        [(bits, head_dim) for bits in CANDIDATES for head_dim in HEAD_DIMS] if options.size == "full" else [(16, 128)]
    )
    kernels = KERNELS[:1] if options.size == "smallest" else KERNELS
    jobs = [(kernel, *size) for size in sizes for kernel in kernels]
    console.print({**about("cuda"), "architecture": arch})
    rows = tune(jobs, arch, limit_bytes, "cuda", deadline)
    columns = ("kernel", "bits", "head_dim", "fit", "old", "old_ms", "new", "new_ms", "gain")
    table = make_table("queries, keys, warps, stages", columns, left=("kernel",))
    for row in rows:
        cells = [", ".join(map(str, row[x])) if isinstance(row[x], list) else str(row[x]) for x in columns]
        table.add_row(*cells, style="green" if row["new"] != row["old"] else None)
    console.print(table)
    done = {(row["kernel"], row["bits"], row["head_dim"]) for row in rows}
    if left_out := [" ".join(map(str, job)) for job in jobs if job not in done]:
        console.print(f"left out, as the time was spent or a process broke: {', '.join(left_out)}", highlight=False)
    write_record(options.json, {"architecture": arch, "rows": rows}, "cuda")
    if not options.dry and options.size != "smallest" and any(row["new"] != row["old"] for row in rows):
        TUNED.write_text(written(blocks.tuned_table()))
        console.print(f"wrote {TUNED}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
