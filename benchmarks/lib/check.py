"""The frame of the checks that consist of sections: which of them run, their record and their tables."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console

from .process import versions
from .script import Row, make_parser, write_record
from .sections import Result, Section, show_result, show_rows, verdict


def check_parser(doc: str, quick: str) -> argparse.ArgumentParser:
    """Return the parser of a check: that of every benchmark, with `--only`."""
    parser = make_parser(doc, quick=quick)
    sections = "run these sections, with commas between them; may be repeated"
    parser.add_argument("--only", metavar="SECTIONS", action="extend", type=lambda x: x.split(","), help=sections)
    return parser


def check_device() -> str:
    """Return "cuda" or "cpu", and let a GPU run compiled kernels: interpreted ones would be tested instead."""
    if not torch.cuda.is_available():
        return "cpu"
    os.environ.pop("TRITON_INTERPRET", None)
    return "cuda"


def chosen(sections: Sequence[Section], only: Sequence[str] | None) -> list[Section]:
    """Return the sections named by `--only`, or all. Raises ValueError if there is none of a name."""
    names = [section.name for section in sections]
    if unknown := set(only or names) - set(names):
        raise ValueError(f"--only {min(unknown)}: is none of {', '.join(names)}")
    return [section for section in sections if section.name in (only or names)]


def run_check(
    sections: Sequence[Section],
    run: Callable[[Section], Result],
    logs: Path,
    console: Console,
    json: Path | None,
    facts: Row,
    tables: Mapping[str, Callable[[list[Row], Console], None]],
) -> int:
    """Run the sections, each shown and written to the record `json` as it ends; return the exit status.

    `facts` are the first fields of the record; `tables` has the functions that print rows which are no plain table.
    """
    device = check_device()
    record: Row = {**facts, "versions": versions(), "sections": []}
    results, started = list[Result](), time.monotonic()
    for section in sections:
        result = run(section)
        results.append(result)
        record["sections"].append(result.section)
        record[section.name] = result.rows
        write_record(json, record, device)
        show_result(result, logs, console, tables.get(section.name, show_rows))
    console.print(f"{time.monotonic() - started:.0f} s in all; {verdict(results)}", soft_wrap=True)
    return 0 if all(result.right for result in results) else 1
