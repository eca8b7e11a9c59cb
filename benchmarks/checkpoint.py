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

os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
import numpy as np
import torch
from longring.launch import checkpoint
from longring.launch.build import build_engine, places
from longring.launch.checkpoint import TrainState
from longring.launch.checkpoint_load import load_last_good
from longring.launch.checkpoint_save import Saver
from longring.launch.config import load_recipe
from longring.launch.run_directory import RunDirectory
from longring.parallel.mesh import join
from longring.parallel.zero import set_learning_rate
from rich.console import Console
from rich.table import Table

SIZES = [(128, 3), (256, 6), (512, 8), (768, 12)]
RECIPE = Path(__file__).parents[1] / "launch" / "recipes" / "demo.toml"
TOKENS = 256
DATA = "0" * 64


def seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(width: int, layers: int, folder: Path, saves: int) -> dict[str, float]:
    shape = [f"model.hidden_size={width}", f"model.num_layers={layers}", f"model.ffn_hidden_size={3 * width}"]
    recipe = load_recipe(RECIPE, [*shape, "parallel.tokens_per_rank=2048", f"run_directory={folder}"])
    mesh = join(recipe.parallel, 1)
    torch.manual_seed(0)
    engine = build_engine(recipe, 8192, mesh)
    set_learning_rate(engine, 1e-4)
    here = places(recipe, mesh, [TOKENS])[TOKENS]
    rows = np.random.default_rng(0).integers(0, 8192, (1, TOKENS + 1)).astype(np.uint16)

    def step() -> None:
        for _ in range(engine.gradient_accumulation_steps()):
            losses = engine(*here.model_inputs(rows, None, mesh.device))
            engine.backward(losses.mean())
            engine.step()

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
    found = checkpoint.last_good(run.checkpoints)
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
    os.environ["MASTER_PORT"] = str(20_000 + os.getpid() % 10_000)
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
