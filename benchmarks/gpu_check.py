"""Correctness and speed on this GPU: the one command for a machine that has one.

    python benchmarks/gpu_check.py --json rows.json   # under nine minutes
    python benchmarks/gpu_check.py --quick            # a minute or two

Needs torch, triton, pytest and rich alone: neither an install of LongRing nor megatron-core or DeepSpeed. It also runs
on a CPU, in small sizes. There are four sections, each in a process of its own, so that a broken one leaves the others
whole:

- the kernels' tests (160 s at most);
- benchmarks/full_sizes.py, attention in full sizes against fp64 (110 s);
- benchmarks/cp_virtual.py, context parallelism on virtual ranks (130 s);
- benchmarks/attention.py, its table and bars (the rest, 120 s or more).

A section that outruns its time is cut off: its rows until then stay, and a note names the parts that were left out. The
section's own command runs all of it. The record is written after every section. The exit status is 1 when something is
wrong or was cut off; slowness does not count.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
import attention
import cp_virtual
import full_sizes
from lib import ROOT
from lib.cases import cases_here
from lib.script import Row, Size, about, make_parser, write_record
from rich.console import Console

Rows = Callable[..., Iterator[Row]]

TOTAL_S = 520
"""Time of all sections together; starting and stopping processes takes the rest of 9 minutes."""
SECTION_S = {"tests": 160, "sizes": 110, "family": 130}
"""Longest time of a section; the last section has the rest."""
CPU_SELECTION = "test_merge or running or strides or written or (head_dims and 32)"
"""Tests of --quick on a CPU, where interpreted kernels are slow."""
SMALLEST_SELECTION = "test_merge"
MARGIN_S = 25
"""Time that a section keeps for its start and for the case under way at its deadline."""


def run_tests(device: str, size: Size, seconds: float, console: Console) -> Row:
    """Run pytest on the kernels' tests in a process of its own, cut off after `seconds`, and return its row."""
    files, notes = ["tests/kernels"], []
    # benchmarks/lib as a plugin: where LongRing is not installed, it lets pytest's processes import it.
    options = ["-q", "-p", "no:cacheprovider", "-p", "lib"]
    if importlib.util.find_spec("hypothesis") is None:
        options += ["--ignore", "tests/kernels/test_mask.py"]
        notes.append("test_mask.py left out: no hypothesis here")
    if importlib.util.find_spec("liger_kernel") is None:
        notes.append("test_fused.py left out: no liger-kernel here")
    elif device == "cuda":
        files.append("tests/model/test_fused.py")
    if size == "smallest" or (size == "quick" and device == "cpu"):
        selection = SMALLEST_SELECTION if size == "smallest" else CPU_SELECTION
        options += ["-k", selection]
        notes.append(f"only -k {selection!r}")
    if device == "cuda" and importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(min(8, os.cpu_count() or 1))]  # a test's time is that of compiling its kernels
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "TRITON_INTERPRET": "1"}
    if device == "cuda":
        del environment["TRITON_INTERPRET"]
    for note in notes:
        console.print(f"tests: {note}", markup=False)
    # -P: the columns of the house must not be importable from the root under their bare names.
    command = [sys.executable, "-P", "-m", "pytest", *options, *files]
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout
    cut_off = threading.Event()

    def cut() -> None:
        cut_off.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, cut)
    timer.start()
    last_lines: list[str] = []
    for line in process.stdout:
        print(line, end="", flush=True)
        last_lines = [*last_lines[-19:], line.rstrip()]
    status = process.wait()
    timer.cancel()
    failed = [line for line in last_lines if line.startswith(("FAILED", "ERROR"))]
    return {
        "section": "tests",
        "status": f"cut off after {seconds:.0f} s" if cut_off.is_set() else "passed" if status == 0 else "failed",
        "seconds": round(time.monotonic() - started, 1),
        "note": "; ".join([*notes, *failed, *last_lines[-1:]]),
    }


def send_rows(sender: Connection, rows: Rows, arguments: tuple[Any, ...]) -> None:
    """Send the rows that a generator yields, and None at its end."""
    for row in rows(*arguments):
        sender.send(row)
    sender.send(None)


def run_rows(
    name: str, rows: Rows, arguments: tuple[Any, ...], seconds: float, console: Console
) -> tuple[list[Row], Row]:
    """Run a generator in a process of its own, killed after `seconds`; return its rows and the section's row."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_rows, args=(sender, rows, arguments))
    started = time.monotonic()
    process.start()
    sender.close()  # so that the end of the process ends the pipe
    found: list[Row] = []
    status = ""
    with console.status(f"{name}: measuring"):
        while True:
            if not receiver.poll(max(0.0, started + seconds - time.monotonic())):
                process.kill()
                status = f"cut off after {seconds:.0f} s"
                break
            try:
                row = receiver.recv()
            except EOFError:
                break
            if row is None:
                status = "done"
                break
            found.append(row)
    process.join(10)
    process.kill()
    status = status or f"its process ended with {process.exitcode}"
    left_out = sum("left out: the time" in row["note"] for row in found)
    note = f"{left_out} rows left out: the time was spent" if left_out else ""
    return found, {"section": name, "status": status, "seconds": round(time.monotonic() - started, 1), "note": note}


def main() -> int:
    options = make_parser(__doc__ or "", quick="few cases: a minute or two").parse_args()
    started = time.time()
    console = Console(width=100)
    cases, device, backend = cases_here(options.size)
    if device == "cuda":
        os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels would be tested instead of compiled ones
    console.print(about(device))
    found: Row = {"sections": [], "sizes": [], "family": [], "rows": [], "bars": []}

    def keep(section: Row) -> None:
        found["sections"].append(section)
        console.print(" ".join(str(x) for x in section.values()), markup=False, highlight=False)
        write_record(options.json, found, device)

    def measure(name: str, rows: Rows, *arguments: Any, seconds: float) -> tuple[list[Row], Row]:
        return run_rows(name, rows, (*arguments, time.time() + seconds - MARGIN_S), seconds, console)

    keep(run_tests(device, options.size, SECTION_S["tests"], console))

    choice = "triton" if device == "cuda" else "auto"
    found["sizes"], section = measure(
        "sizes", full_sizes.all_rows, device, choice, options.size, seconds=SECTION_S["sizes"]
    )
    full_sizes.show(found["sizes"], console)
    keep(section)

    found["family"], section = measure(
        "family", cp_virtual.all_rows, device, backend, options.size, seconds=SECTION_S["family"]
    )
    found["bars"] = cp_virtual.bars(found["family"])
    cp_virtual.show(found["family"], console)
    keep(section)

    left_s = started + TOTAL_S - time.time()
    found["rows"], section = measure("speed", attention.all_rows, cases, device, backend, seconds=left_s)
    found["bars"] += attention.bars(found["rows"])
    if found["rows"]:
        attention.show(found["rows"], console)
    keep(section)

    right = all(section["status"] in ("passed", "done") for section in found["sections"])
    right &= all(row["right"] is not False for row in found["sizes"] + found["family"])
    verdict = "no errors" if right else "[bold red]errors: see above[/]"
    console.print(f"{time.time() - started:.0f} s in all; {verdict}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
