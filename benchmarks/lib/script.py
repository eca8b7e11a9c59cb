"""The frame of every benchmark script: its arguments, its record and its tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Container, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
Size = Literal["full", "quick", "smallest"]
"""How much a benchmark measures: what its record holds, about a minute of it, or each part once at its least size."""

HELP_COLUMNS = 78


def make_parser(doc: str, quick: str) -> argparse.ArgumentParser:
    """Return a parser that prints the script's docstring as help and has the options of every benchmark.

    `options.size` is a `Size`; `options.json` is the file to write the record to, or None.
    """
    parser = argparse.ArgumentParser(
        description=help_text(doc), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", help=quick)
    size.add_argument(
        "--smallest",
        dest="size",
        action="store_const",
        const="smallest",
        help="run every part once at its least size, in seconds; the figures mean nothing",
    )
    parser.set_defaults(size="full")
    parser.add_argument(
        "--json", type=_record, metavar="FILE", help="write the record: results, date, command, machine and versions"
    )
    return parser


def _record(text: str) -> Path:
    """Return the file of a record; it is written after the work, so its directory is looked for before."""
    file = Path(text)
    if not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no directory {file.parent}; make it first")
    return file


def help_text(doc: str) -> str:
    """Return a docstring with its paragraphs and list items wrapped for a terminal; indented lines stay as they are."""
    wrapped = []
    for paragraph in doc.strip().split("\n\n"):
        if paragraph.startswith("    "):
            wrapped.append(paragraph)
            continue
        items = [" ".join(item.split()) for item in re.split(r"\n(?=- )", paragraph)]
        indents = ["  " if item.startswith("- ") else "" for item in items]
        filled = [
            textwrap.fill(item, HELP_COLUMNS, subsequent_indent=indent)
            for item, indent in zip(items, indents, strict=True)
        ]
        wrapped.append("\n".join(filled))
    return "\n\n".join(wrapped)


def about(device: str = "cpu") -> Row:
    """Return the facts that make a figure comparable: date, command, machine and versions."""
    found: Row = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "device": f"CPU {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }
    if torch := sys.modules.get("torch"):  # scripts without torch do not pay for its import
        found |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
        if device == "cuda":
            import triton  # CPU machines need not have it

            found |= {
                "device": torch.cuda.get_device_name(),
                "triton": triton.__version__,
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),
            }
    return found


def write_record(file: Path | None, results: Mapping[str, Any], device: str = "cpu", *, indent: int | None = 1) -> None:
    """Write the results and `about(device)` as JSON; do nothing if there is no file."""
    if file is not None:
        file.write_text(json.dumps({**about(device), **results}, indent=indent) + "\n")


def make_table(title: str, columns: Sequence[str], left: Container[str] = ()) -> Table:
    """Return an empty table; columns named in `left` are aligned left, all others right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    return table


def refuse(reason: str) -> int:
    """Print why the benchmark cannot run here and return exit status 2."""
    Console(stderr=True).print(f"[bold red]error:[/] {reason}", highlight=False)
    return 2


def seconds_of(work: Callable[[], object]) -> float:
    """Return the elapsed seconds of a call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
