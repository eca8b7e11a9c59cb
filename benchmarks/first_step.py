"""Seconds from the command `longring train` to the end of its first step, by part and number of ranks.

    python benchmarks/first_step.py --json rows.json       # five minutes
    python benchmarks/first_step.py --against ../other     # with its own .venv

The run is that of the demo's recipe on 200 files of the standard library. Its processes and files are watched from
outside, 50 times a second: checks ends when the first rank is started, imports when rank 0 has its log, model when rank
0 tells the ranks, step when the metrics have a line. With --against the checkouts take turns. Figures are medians.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
import psutil
from lib.one_rank import RECIPE
from lib.script import Row, make_parser, make_table, write_record
from longring.data.prepare.prepare import prepare
from longring.launch.config import load_recipe
from rich.console import Console

PARTS = ("checks", "imports", "model", "step")
TOKENS = 2048
"""Tokens of the longest bucket and of a step."""
LIMIT_S = 300
HERE = Path(sys.executable).with_name("longring")


def is_rank(process: psutil.Process) -> bool:
    """Return whether a process is a rank; others come and go."""
    with suppress(psutil.Error):
        return "longring.launch.train" in process.cmdline()
    return False


def start(command: Path, ranks: int, data: list[str], folder: Path) -> dict[str, float]:
    """Train one step with a checkout's command in `folder`, a new one; return the seconds of each part."""
    run = folder / "run"
    own = [f"run_directory={run}", f"train.ranks_per_node={ranks}", f"parallel.tokens_per_rank={TOKENS // ranks}"]
    arguments = [str(command), "train", str(RECIPE), "--stop-after", "1", *data, *own]
    said = folder / "said"
    with said.open("w") as stream:
        began = time.time()
        process = subprocess.Popen(arguments, stdout=stream, stderr=subprocess.STDOUT)
        launcher, ends = psutil.Process(process.pid), {}

        def await_that(part: str, happened: Callable[[], object]) -> None:
            while not happened():
                if process.poll() is not None or time.time() - began > LIMIT_S:
                    process.kill()
                    raise SystemExit(f"{part}: {said.read_text()}")
                time.sleep(0.02)
            ends[part] = time.time() - began

        await_that("checks", lambda: any(is_rank(child) for child in launcher.children()))
        await_that("imports", (run / "logs" / "rank-00000.log").exists)
        await_that("model", lambda: "ranks:" in said.read_text())
        await_that("step", lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size)
        process.wait()
    before = dict(zip(PARTS, (0.0, *ends.values()), strict=False))
    return {part: ends[part] - before[part] for part in PARTS} | {"first_step": ends["step"]}


def row(command: str, ranks: int, found: list[dict[str, float]]) -> Row:
    """Return the medians of several starts."""
    medians = {f"{part}_s": round(median(start[part] for start in found), 2) for part in (*PARTS, "first_step")}
    return {"checkout": command, "ranks": ranks, "starts": len(found), **medians}


def main() -> int:
    parser = make_parser(__doc__ or "", quick="one rank, two starts")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout of LongRing to compare with")
    options = parser.parse_args()
    commands = {"here": HERE}
    if options.against:
        commands["there"] = options.against.resolve() / ".venv" / "bin" / "longring"
    starts = {"full": 3, "quick": 2, "smallest": 1}[options.size]
    os.environ["OMP_NUM_THREADS"] = "1"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        data = [f"data.directory={temporary}/data", "data.source.limit_documents=200", "data.tokenizer.vocab_size=1024"]
        nowhere = ["run_directory=nowhere"]
        prepare(load_recipe(RECIPE, [*data, *nowhere]).data, Console(quiet=True))
        for ranks in (1, 2, 4) if options.size == "full" else (1,):
            found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
            for number in range(starts):
                for name, command in commands.items():
                    folder = Path(temporary) / f"{name}-{ranks}-{number}"
                    folder.mkdir()
                    found[name].append(start(command, ranks, data, folder))
            rows += [row(name, ranks, of_command) for name, of_command in found.items()]
    columns = ("checkout", "ranks", "starts", *(f"{part}, s" for part in PARTS), "first step, s")
    table = make_table("From the command to the end of the first step", columns, left=("checkout",))
    for of_row in rows:
        table.add_row(*map(str, of_row.values()))
    Console(width=100).print(table)
    write_record(options.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
