"""Cost of a save to training: in the background, blocking, and by DeepSpeed's own writer.

    python benchmarks/checkpoint.py --json rows.json   # ten minutes
    python benchmarks/checkpoint.py --quick            # the two smallest models

One rank, ZeRO 1, fp32, models of growing size; the three writers take turns, and the fastest of five saves counts.
Training goes on while a background save is written: besides the time that it waits, its steps take longer. Before each
save the ranks compare replicated weights, which is a pass over the weights and a message of 8 bytes.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib.one_rank import count_parameters, one_rank
from lib.script import Row, make_parser, make_table, seconds_of, write_record
from longring.launch.checkpoint.format import CheckpointManifest, TrainState, last_good_checkpoint
from longring.launch.checkpoint.load import load_last_good
from longring.launch.checkpoint.save import Saver
from longring.launch.identity import identity_of
from longring.launch.run_directory import RunDirectory
from longring.parallel.replicas import drifted_ranks
from rich.console import Console

SIZES = [(128, 3), (256, 6), (512, 8), (768, 12), (1024, 24)]
TOKENS = 256


def accept(manifest: CheckpointManifest, checkpoint: Path) -> None:
    """Let a start continue from any checkpoint."""


def measure(width: int, layers: int, folder: Path, saves: int) -> Row:
    """Return the fastest of several saves of one model, in seconds and bytes."""
    recipe, mesh, engine, step = one_rank(folder, width, layers, TOKENS)
    step()
    alone = statistics.median(seconds_of(step) for _ in range(5))
    run, identity = RunDirectory(folder), identity_of(recipe, "0" * 64, "0" * 32)
    saver = Saver(engine, run, mesh, recipe.train, 1)
    times: dict[str, list[float]] = {
        name: [] for name in ("compare", "stall", "visible", "slower", "blocking", "deepspeed", "load")
    }
    theirs = folder / "deepspeed"
    number = 0

    def state() -> TrainState:
        skipped = tuple(range(2, number + 1))
        return TrainState(**vars(identity), step=number, skipped=skipped, world_size=1, tensor=1, zero_stage=1)

    for _ in range(saves):
        number += 1
        times["compare"].append(seconds_of(lambda: drifted_ranks(engine, mesh)))
        started = time.perf_counter()
        times["stall"].append(saver.begin(state()))
        during = []
        while saver.status == "writing":
            during.append(seconds_of(step))
        saver.finish()
        times["visible"].append(time.perf_counter() - started)
        times["slower"].append(statistics.mean(during) / alone if during else 1.0)
        number += 1
        times["blocking"].append(seconds_of(lambda: (saver.begin(state()), saver.finish())))
        times["deepspeed"].append(seconds_of(lambda: (engine.save_checkpoint(str(theirs), tag="x"), os.sync())))
        times["load"].append(seconds_of(lambda: load_last_good(engine, run.checkpoints, mesh, accept)))
    saver.close()
    found = last_good_checkpoint(run.checkpoints)
    assert found is not None
    result = {name: min(values) for name, values in times.items()}
    result["slower"] = statistics.median(times["slower"])
    result["parameters"] = count_parameters(engine)
    result["bytes"] = found[1].num_bytes
    result["deepspeed_bytes"] = sum(file.stat().st_size for file in (folder / "deepspeed").rglob("*.pt"))
    result["step"] = alone
    return result


def main() -> int:
    options = make_parser(__doc__ or "", quick="the two smallest models: under a minute").parse_args()
    sizes = {"full": SIZES, "quick": SIZES[:2], "smallest": [(64, 1)]}[options.size]
    rows = []
    for width, layers in sizes:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(width, layers, Path(folder) / "run", saves=1 if options.size == "smallest" else 5))
    columns = (
        "parameters",
        "MB",
        "compare",
        "training waits",
        "steps meanwhile",
        "visible",
        "blocking",
        "DeepSpeed",
        "load",
    )
    table = make_table("A save, in ms, and as a multiple of the wait of a background save", columns)
    for row in rows:
        table.add_row(
            f"{row['parameters'] / 1e6:.1f}M",
            f"{row['bytes'] / 1e6:,.0f} / {row['deepspeed_bytes'] / 1e6:,.0f}",
            f"{row['compare'] * 1e3:,.1f} ({row['compare'] / row['step']:.2%} of a step)",
            f"{row['stall'] * 1e3:,.0f}",
            f"{row['slower']:.2f}x",
            f"{row['visible'] * 1e3:,.0f}",
            f"{row['blocking'] * 1e3:,.0f} ({row['blocking'] / row['stall']:.0f}x)",
            f"{row['deepspeed'] * 1e3:,.0f} ({row['deepspeed'] / row['stall']:.0f}x)",
            f"{row['load'] * 1e3:,.0f}",
        )
    Console(width=140).print(table)
    write_record(options.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
