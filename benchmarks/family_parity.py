"""Errors of losses, logits and gradients of every family, scaling and division against transformers in fp64.

    python benchmarks/family_parity.py --json rows.json    # five minutes
    python benchmarks/family_parity.py --quick             # one rank alone

It runs tests/launch/test_families.py, whose models are small and random, and whose sequences have twice the original
context, and collects the errors that it measures: root mean squares of the error over that of the exact tensor. Those
of gradients are the largest of any parameter.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib import ROOT
from lib.script import Row, make_parser, make_table, write_record
from rich.console import Console

TEST = "tests/launch/test_families.py::test_a_family_equals_transformers"
DIVISIONS = ("one", "cp2", "cp4", "tp2", "tp2-sp", "zero3", "tp2-sp-cp2-zero3")
CHOSEN = {"full": "", "quick": "one", "smallest": "llama-one"}


def rows_of(chosen: str) -> list[Row]:
    """Run the chosen cases; return a row for each. Raises SystemExit with its output if one fails."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-k", chosen, f"--junitxml={report}", TEST]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        cases = ElementTree.parse(report).iter("testcase")
        return [row for case in cases if (row := _row(case)) is not None]


def _row(case: ElementTree.Element) -> Row | None:
    found = {entry.attrib["name"]: json.loads(entry.attrib["value"]) for entry in case.iter("property")}
    if not found:
        return None  # transformers is not installed
    name = case.attrib["name"].partition("[")[2].rstrip("]")
    division = max((known for known in DIVISIONS if name.endswith(f"-{known}")), key=len)
    row: Row = {"model": name.removesuffix(f"-{division}"), "division": division, **summary(found["errors"])}
    if "transformers" in found:
        row["transformers"] = summary(found["transformers"])
    return row


def summary(errors: Mapping[str, float]) -> dict[str, float]:
    """Return the errors of losses and logits, and the largest one of a gradient."""
    named = ("losses", "logits", "logits within", "logits beyond")
    gradients = max(error for name, error in errors.items() if name not in named)
    return {**{name.replace(" ", "_"): errors[name] for name in named}, "gradients": gradients}


def main() -> int:
    options = make_parser(__doc__ or "", quick="one rank alone: a minute").parse_args()
    rows = rows_of(CHOSEN[options.size])
    divisions = [name for name in DIVISIONS if any(row["division"] == name for row in rows)]
    columns = ["model", "within", "beyond", *divisions, "transformers"]
    table = make_table("Largest relative error, in units of 1e-7", columns, left={"model"})
    for model in dict.fromkeys(row["model"] for row in rows):
        own = {row["division"]: row for row in rows if row["model"] == model}
        within, beyond = (max(row[key] for row in own.values()) for key in ("logits_within", "logits_beyond"))
        theirs = next((row["transformers"]["gradients"] for row in own.values() if "transformers" in row), None)
        found = [within, beyond, *(own[name]["gradients"] if name in own else None for name in divisions), theirs]
        table.add_row(model, *("" if error is None else f"{1e7 * error:.1f}" for error in found))
    Console(width=120).print(table)
    write_record(options.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
