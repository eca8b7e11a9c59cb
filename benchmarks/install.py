"""Size of an installation and cost of an import: the library alone, and each extra.

    python benchmarks/install.py --json rows.json

Sizes are those of the files of all distributions that an extra requires, in the versions that are installed here (torch
in its CPU build, no compiled Python files), so nothing is installed. Imports are fresh processes; their CPU seconds are
medians.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib.script import Row, make_parser, make_table, write_record
from longring.launch.extras import MODULES
from packaging.requirements import Requirement
from rich.console import Console

IMPORTS = {
    "import longring": "import longring",
    "longring.attention": "import longring; longring.attention",
    "longring.ContextParallel": "import longring; longring.ContextParallel",
    "longring.document_order": "import longring; longring.document_order",
    "import torch": "import torch",
    "the command's modules": "import longring.launch.cli",
    "the modules of a training rank": "import longring.launch.train",
}
"""Statements by the name of their row."""
MEASURE = """
import resource
{statement}
usage = resource.getrusage(resource.RUSAGE_SELF)
peak = [line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1]
print(usage.ru_utime + usage.ru_stime, int(peak) / 1024)
"""


def required(name: str, extra: str, found: dict[str, metadata.Distribution]) -> None:
    """Add a distribution and all that it requires, with an extra of it, to `found`, by normalized name."""
    distribution = metadata.distribution(name)
    found[re.sub(r"[-_.]+", "-", name).lower()] = distribution
    for text in distribution.requires or ():
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": extra}):
            continue
        for wanted in needed.extras or {""}:
            key = (re.sub(r"[-_.]+", "-", needed.name).lower(), wanted)
            if key[0] not in found or (key[0] == "longring" and wanted != extra):
                required(needed.name, wanted, found)


def size_of(extra: str) -> Row:
    """Return the number of distributions of an extra ("": of the library) and the bytes of their files."""
    found: dict[str, metadata.Distribution] = {}
    required("longring", extra, found)
    # An editable install lists no file of ours. The wheel has the folders to which the package's links lead.
    package = Path(__file__).parents[1] / "longring"
    own = [*package.iterdir(), *(file for folder in package.iterdir() for file in folder.resolve().rglob("*"))]
    others = [Path(str(file.locate())) for each in found.values() for file in each.files or ()]
    num_bytes = sum(path.stat().st_size for path in (*own, *others) if path.is_file() and path.suffix != ".pyc")
    return {"extra": extra or "none", "distributions": len(found), "megabytes": num_bytes / 2**20}


def cost_of(name: str, repeats: int) -> Row:
    """Return the CPU seconds and the peak memory of a fresh process that runs a statement."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", MEASURE.format(statement=IMPORTS[name])]
    results = []
    for _ in range(repeats):
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        results.append(tuple(map(float, done.stdout.split()[-2:])))
    seconds, megabytes = zip(*results, strict=True)
    return {"import": name, "cpu_s": statistics.median(seconds), "peak_megabytes": max(megabytes)}


def main() -> int:
    options = make_parser(__doc__ or "", quick="one import of each").parse_args()
    repeats = {"full": 3, "quick": 1, "smallest": 1}[options.size]
    names = list(IMPORTS)[:2] if options.size == "smallest" else list(IMPORTS)
    sizes = [size_of(extra) for extra in ("", *MODULES, "all")]
    table = make_table("Installed size", ("extra", "distributions", "MB"))
    for row in sizes:
        table.add_row(row["extra"], str(row["distributions"]), f"{row['megabytes']:,.0f}")
    Console(width=100).print(table)
    rows = [cost_of(name, repeats) for name in names]
    table = make_table("A fresh process", ("import", "CPU s", "peak, MB"))
    for row in rows:
        table.add_row(row["import"], f"{row['cpu_s']:.2f}", f"{row['peak_megabytes']:,.0f}")
    Console(width=100).print(table)
    write_record(options.json, {"sizes": sizes, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
