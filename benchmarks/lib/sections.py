"""Sections of a check: processes with a time limit, whose rows are kept although they hang or end early."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from .script import Row, make_table

LIMIT = "LONGRING_SECTION_SECONDS"
"""Variable with the time limit of the section that a process belongs to."""
LEFT_OUT = 77
"""Exit status of a section that cannot run here."""
GRACE_S = 20.0
"""Seconds that the other ranks of a section have to end after one has failed."""
ABORT_S = 3.0
"""Seconds that a process has to print its stacks before it is killed."""
KILLED_S = 10.0
"""Seconds within which a killed process is gone; one that waits in a driver may stay."""
TAIL = 12
"""Lines of a log that are shown when its section fails."""
NO_TIME = "left out: the time was spent"
"""Note of a row that stands for what was not measured for lack of time, which is no error."""


class Section(NamedTuple):
    """A part of a check, in processes of its own."""

    name: str
    generator: str
    """Generator of the rows, as MODULE:NAME; every process calls it."""
    seconds: float
    """Time limit, the start of the processes included."""
    arguments: dict[str, Any]
    """Keyword arguments of the generator, which can be written as JSON."""


class Result(NamedTuple):
    """Result of a section: its rows, and the row about itself (section, status, seconds, note)."""

    rows: list[Row]
    section: Row

    @property
    def right(self) -> bool:
        """Whether the section ended by itself with rows that are all right, or was left out.

        A row whose `right` is None was to be checked, and was not.
        """
        ended = self.section["status"] == "left out" or (self.section["status"] == "done" and self.rows != [])
        return ended and all(row.get("right", True) is True for row in self.rows)


def limit_s() -> float:
    """Return the time limit of this process's section, in seconds."""
    return float(os.environ[LIMIT])


def start(section: Section, processes: Sequence[Mapping[str, str]], logs: Path) -> list[subprocess.Popen]:
    """Start a section on one process for each set of variables; the output of process n goes to `logs`/SECTION-n.log.

    The processes end with this one.
    """
    logs.mkdir(parents=True, exist_ok=True)
    # -P: the columns of the house must not be importable from the root under their bare names.
    module = [sys.executable, "-P", "-m", "lib.section_process"]
    command = [*module, str(os.getpid()), section.generator, json.dumps(section.arguments)]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    running = []
    for number, variables in enumerate(processes):
        rows_file = _file(logs, section, number, "rows")
        rows_file.write_text("")
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": path,
            LIMIT: str(section.seconds),
            **variables,
        }
        with _file(logs, section, number, "log").open("w") as log:
            running.append(
                subprocess.Popen([*command, rows_file], env=environment, stdout=log, stderr=log, start_new_session=True)
            )
    return running


def run_section(
    section: Section,
    processes: Sequence[Mapping[str, str]],
    logs: Path,
    failed_elsewhere: Callable[[], bool] = lambda: False,
) -> Result:
    """Run a section as `start` does, all of it killed at its limit; return what it left.

    A process that is cut off prints its stacks to its log. When one process fails, here or (`failed_elsewhere`) on
    another machine, the others have `GRACE_S` to end.
    """
    started = time.monotonic()
    deadline, cut_off = started + section.seconds, False
    running = start(section, processes, logs)
    try:
        while any(process.poll() is None for process in running):
            if any(process.poll() for process in running) or failed_elsewhere():
                deadline = min(deadline, time.monotonic() + GRACE_S)
            if time.monotonic() > deadline:
                cut_off = time.monotonic() > started + section.seconds
                _end(running)
                break
            time.sleep(0.1)
    finally:  # after an interrupt too
        for process in running:
            _kill_group(process)  # what a process has left behind, pytest's workers for example
    await_all(running, KILLED_S)
    statuses = [process.poll() for process in running]
    rows = [
        json.loads(line)
        for number in range(len(running))
        for line in _file(logs, section, number, "rows").read_text().splitlines()
    ]
    status, note = _judged(statuses, cut_off, section)
    if status != "done":
        number = next((n for n, found in enumerate(statuses) if found and found != -signal.SIGABRT), 0)
        alive = [process.pid for process in running if process.poll() is None]
        survive = f"processes {alive} survive SIGKILL, which is a fault of the machine" if alive else ""
        note = "; ".join(filter(None, [note, survive, _last_line(_file(logs, section, number, "log"))]))
    seconds = round(time.monotonic() - started, 1)
    return Result(rows, {"section": section.name, "status": status, "seconds": seconds, "note": note})


def await_all(running: Sequence[subprocess.Popen], seconds: float) -> None:
    """Wait until all processes have ended, at most for some seconds."""
    deadline = time.monotonic() + seconds
    while any(process.poll() is None for process in running) and time.monotonic() < deadline:
        time.sleep(0.05)


def _judged(statuses: Sequence[int | None], cut_off: bool, section: Section) -> tuple[str, str]:
    """Return the status of a section and the exit statuses of its processes, in words; None: it has not ended."""
    if cut_off:
        ended = [number for number, status in enumerate(statuses) if status != -signal.SIGABRT]
        note = f"processes {ended} had ended" if ended else ""
        return f"cut off after {section.seconds:.0f} s", note
    if set(statuses) == {0}:
        return "done", ""
    if set(statuses) == {LEFT_OUT}:
        return "left out", ""
    return "failed", "exit statuses " + " ".join(map(str, statuses))


def _file(logs: Path, section: Section, number: int, kind: str) -> Path:
    return logs / f"{section.name}-{number}.{kind}"


def _end(running: Sequence[subprocess.Popen]) -> None:
    """Let the processes print their stacks, and end."""
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGABRT)
    await_all(running, ABORT_S)


def _kill_group(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _last_line(log: Path) -> str:
    """Return the last line that is no part of a stack."""
    lines = log.read_text(errors="replace").splitlines()
    said = [line for line in lines if line.strip() and not re.match(r"\s|Thread 0x|Current thread|Fatal Python", line)]
    return said[-1][:300] if said else ""


def show_rows(rows: Sequence[Row], console: Console) -> None:
    """Print rows as a table."""
    console.print(rows_table(rows))


def show_result(
    result: Result, logs: Path, console: Console, show: Callable[[list[Row], Console], None] = show_rows
) -> None:
    """Print a section's rows by `show`, and its status; the ends of its logs too if it is not done."""
    section = result.section
    if result.rows:
        console.print(f"\n[bold]{section['section']}[/]")
        show(result.rows, console)
    rows = "" if result.rows or section["status"] != "done" else " without a result"
    line = f"{section['section']}: {section['status']}{rows}, {section['seconds']:.0f} s"
    console.print(line, style=None if result.right else "bold red", markup=False, highlight=False)
    if section["note"]:
        console.print(f"  {section['note']}", markup=False, highlight=False)
    if section["status"] in ("done", "left out"):
        return
    for log in sorted(logs.glob(f"{section['section']}-*.log")):
        console.print(f"  {log}:", markup=False, highlight=False, soft_wrap=True)
        for line in log.read_text(errors="replace").splitlines()[-TAIL:]:
            console.print(f"    {line}", markup=False, highlight=False, soft_wrap=True)


def verdict(results: Sequence[Result]) -> str:
    """Return which sections are wrong, which were left out, and which lacked time for all of their rows, in words."""
    wrong = [result.section["section"] for result in results if not result.right]
    left_out = [result.section["section"] for result in results if result.section["status"] == "left out"]
    late = [result.section["section"] for result in results if any(row.get("note") == NO_TIME for row in result.rows)]
    text = f"errors in {', '.join(wrong)}: see above" if wrong else "no errors"
    text += f"; left out: {', '.join(left_out)}" if left_out else ""
    return text + (f"; not whole for lack of time: {', '.join(late)}" if late else "")


def rows_table(rows: Sequence[Row]) -> Table:
    """Return a table of rows: one column for each key, numbers with three or four digits, what is wrong in red."""
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "note"]
    texts = [key for key in keys if any(isinstance(row.get(key), str) for row in rows)]
    table = make_table("", [key.replace("_", " ") for key in keys], left=[key.replace("_", " ") for key in texts])
    for row in rows:
        known = {**row, "right": "not checked"} if row.get("right", True) is None else row
        table.add_row(*(_cell(known.get(key)) for key in keys), style=None if row.get("right", True) is True else "red")
    notes = dict.fromkeys(row["note"] for row in rows if row.get("note"))
    table.caption, table.caption_justify = "\n".join(notes) or None, "left"
    return table


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
