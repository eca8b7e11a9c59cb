"""The one command for a machine with a GPU: correctness of every kernel in full sizes, then speed beside torch's.

    python benchmarks/gpu_check.py --json benchmarks/results/attention_h200_2026-11-21.json
    python benchmarks/gpu_check.py --quick          # a minute or two; also runs on a CPU, in small sizes

Needs torch, triton, pytest and rich alone: neither an install of LongRing nor megatron-core or DeepSpeed. Four
sections, each in a process of its own, so that a broken one leaves the others whole: the kernels' tests (160 s at
most); attention in full sizes against fp64, among them a million tokens, whose addresses pass 32 bits (110 s); the
family of context parallelism on virtual ranks, benchmarks/cp_virtual.py (130 s); the table and bars of
benchmarks/attention.py (what is left, 120 s or more). The whole takes under 9 minutes: a section that outruns its time
is cut off, what it found until then stays, and what was left out is said; a section's own command does all of it.
--json is written after every section. The exit status is 1 when something is wrong or was cut off; slowness is none.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
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

sys.path.insert(0, str(Path(__file__).parent))  # scripts find each other even under PYTHONSAFEPATH
import attention
import cp_virtual
import full_sizes
from lib import ROOT
from lib.cases import Row, about, plan
from rich.console import Console

TOTAL_S = 520
"""All sections together; starting and stopping processes takes the rest of 9 minutes."""
SECTION_S = {"tests": 160, "sizes": 110, "family": 130}
"""The most a section may take; the last has what is left."""
CPU_SELECTION = "test_merge or running or strides or written or (head_dims and 32)"
"""Tests of --quick on a CPU, where interpreted kernels are slow."""


def run_tests(device: str, quick: bool, seconds: float, console: Console) -> Row:
    """pytest on the kernels' tests in a process of its own, cut off after `seconds`."""
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
    if quick and device == "cpu":
        options += ["-k", CPU_SELECTION]
        notes.append(f"only -k {CPU_SELECTION!r}")
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
    timer = threading.Timer(seconds, lambda: (cut_off.set(), os.killpg(process.pid, signal.SIGKILL)))
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


def send_rows(sender: Connection, rows: Callable[..., Iterator[Row]], arguments: tuple[Any, ...]) -> None:
    for row in rows(*arguments):
        sender.send(row)
    sender.send(None)


def run_rows(
    name: str, rows: Callable[..., Iterator[Row]], arguments: tuple[Any, ...], seconds: float, console: Console
) -> tuple[list[Row], Row]:
    """Rows that a generator yields in a process of its own, killed after `seconds`; and what became of it."""
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
    note = f"{left_out} left out for want of time" if left_out else ""
    return found, {"section": name, "status": status, "seconds": round(time.monotonic() - started, 1), "note": note}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few cases, a minute or two")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what is known here after every section")
    options = parser.parse_args()
    started = time.time()
    console = Console(width=100)
    cases, device, backend = plan(options.quick)
    if device == "cuda":
        os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels would be tested instead of compiled ones
    result: Row = {**about(device), "sections": [], "sizes": [], "family": [], "rows": [], "bars": []}
    console.print({name: value for name, value in result.items() if not isinstance(value, list)})

    def left_s() -> float:
        return started + TOTAL_S - time.time()

    def keep(section: Row) -> None:
        result["sections"].append(section)
        console.print(" ".join(str(x) for x in section.values()), markup=False, highlight=False)
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")

    keep(run_tests(device, options.quick, SECTION_S["tests"], console))
    seconds = SECTION_S["sizes"]
    choice = "triton" if device == "cuda" else "auto"
    arguments = (device, choice, options.quick, time.time() + seconds - 25)  # 25 s: a start, and the case under way
    result["sizes"], section = run_rows("sizes", full_sizes.all_rows, arguments, seconds, console)
    full_sizes.show(result["sizes"], console)
    keep(section)
    seconds = SECTION_S["family"]
    arguments = (device, backend, options.quick, time.time() + seconds - 25)
    result["family"], section = run_rows("family", cp_virtual.all_rows, arguments, seconds, console)
    result["bars"] = cp_virtual.bars(result["family"])
    cp_virtual.show(result["family"], console)
    keep(section)
    seconds = left_s()
    arguments = (cases, device, backend, time.time() + seconds - 25)
    result["rows"], section = run_rows("speed", attention.all_rows, arguments, seconds, console)
    result["bars"] += attention.bars(result["rows"])
    if result["rows"]:
        attention.show(result["rows"], console)
    keep(section)
    right = all(section["status"] in ("passed", "done") for section in result["sections"])
    right &= all(row["right"] is not False for row in result["sizes"] + result["family"])
    console.print(
        f"{time.time() - started:.0f} s in all; " + ("no errors" if right else "[bold red]errors, see above[/]")
    )
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
