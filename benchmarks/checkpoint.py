"""What a save costs training: in the background, blocking, and by DeepSpeed's own writer; bytes, and time to load.

    .venv/bin/python benchmarks/checkpoint.py [--quick] [--json FILE]

One rank, ZeRO 1, fp32, models of growing size, in turns, the fastest of five saves. Training goes on while the
background save is written, so besides the time it stood still there is the time its steps took longer.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # scripts find each other even under PYTHONSAFEPATH
from lib.one_rank import one_rank
from longring.launch.checkpoint.format import TrainState, last_good_checkpoint
from longring.launch.checkpoint.load import load_last_good
from longring.launch.checkpoint.save import Saver
from longring.launch.run_directory import RunDirectory
from rich.console import Console
from rich.table import Table

SIZES = [(128, 3), (256, 6), (512, 8), (768, 12), (1024, 24)]
TOKENS = 256
DATA = "0" * 64


def seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(width: int, layers: int, folder: Path, saves: int) -> dict[str, float]:
    recipe, mesh, engine, step = one_rank(folder, width, layers, TOKENS)
    step()
    alone = statistics.median(seconds(step) for _ in range(5))
    run = RunDirectory(folder)
    saver = Saver(engine, run, mesh, recipe.train, 1)
    times: dict[str, list[float]] = {
        name: [] for name in ("stall", "visible", "slower", "blocking", "deepspeed", "load")
    }
    number = 0

    def state() -> TrainState:
        return TrainState(
            step=number, skipped=tuple(range(2, number + 1)), data=DATA, world_size=1, tensor=1, zero_stage=1
        )

    for _ in range(saves):
        number += 1
        started = time.perf_counter()
        times["stall"].append(saver.begin(state()))
        during = []
        while saver.status == "writing":
            during.append(seconds(step))
        saver.finish()
        times["visible"].append(time.perf_counter() - started)
        times["slower"].append(statistics.mean(during) / alone if during else 1.0)
        number += 1
        times["blocking"].append(seconds(lambda: (saver.begin(state()), saver.finish())))
        theirs = folder / "deepspeed"
        times["deepspeed"].append(seconds(lambda path=theirs: (engine.save_checkpoint(str(path), tag="x"), os.sync())))
        times["load"].append(seconds(lambda: load_last_good(engine, run.checkpoints, mesh, DATA)))
    saver.close()
    found = last_good_checkpoint(run.checkpoints)
    assert found is not None
    result = {name: min(values) for name, values in times.items()}
    result["slower"] = statistics.median(times["slower"])
    result["parameters"] = sum(p.numel() for p in engine.module.parameters())
    result["bytes"] = found[1].num_bytes
    result["deepspeed_bytes"] = sum(file.stat().st_size for file in (folder / "deepspeed").rglob("*.pt"))
    result["step"] = alone
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the two smallest models; under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    options = parser.parse_args()
    rows = []
    for width, layers in SIZES[: 2 if options.quick else None]:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(width, layers, Path(folder) / "run", saves=5))
    table = Table(title="A save, in ms; times as much as the wait of a background save")
    for name in ("parameters", "MB", "training waits", "steps meanwhile", "visible", "blocking", "DeepSpeed", "load"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row['parameters'] / 1e6:.1f}M",
            f"{row['bytes'] / 1e6:,.0f} / {row['deepspeed_bytes'] / 1e6:,.0f}",
            f"{row['stall'] * 1e3:,.0f}",
            f"{row['slower']:.2f}x",
            f"{row['visible'] * 1e3:,.0f}",
            f"{row['blocking'] * 1e3:,.0f} ({row['blocking'] / row['stall']:.0f}x)",
            f"{row['deepspeed'] * 1e3:,.0f} ({row['deepspeed'] / row['stall']:.0f}x)",
            f"{row['load'] * 1e3:,.0f}",
        )
    Console(width=120).print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
