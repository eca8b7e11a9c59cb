"""An hour of training with random kills: steps lost and seconds lost for each, and whether memory stays flat.

    .venv/bin/python benchmarks/soak.py [--minutes 60] [--quick] [--json FILE]

`longring train` on two ranks, the demo's recipe made smaller. At random times a rank is killed, a rank or the launcher
gets SIGTERM, or a rank is stopped; then the same command runs again. Checkpoints every 20 steps.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from longring.launch.metrics import read_metrics
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

RECIPE = Path(__file__).parents[1] / "launch" / "recipes" / "demo.toml"
EVERY = 20
FAULTS = {
    "rank killed": lambda launcher, rank: rank.kill(),
    "SIGTERM to the launcher": lambda launcher, rank: launcher.send_signal(signal.SIGTERM),
    "SIGUSR1 to a rank": lambda launcher, rank: rank.send_signal(signal.SIGUSR1),
    "rank stopped (hang)": lambda launcher, rank: rank.suspend(),
}


def settings(folder: Path) -> list[str]:
    return [
        f"run_directory={folder}/run",
        f"data.directory={folder}/data",
        "data.source.limit_documents=200",
        "data.max_bucket_tokens=512",
        "parallel.tokens_per_rank=256",
        "train.global_batch_tokens=1024",
        "train.steps=1000000",
        f"train.checkpoint_every_steps={EVERY}",
        "faults.hang_minutes=0.2",
        "model.num_layers=2",
        "model.hidden_size=64",
        "model.ffn_hidden_size=192",
    ]


def done(run: Path) -> int:
    file = run / "metrics.jsonl"
    try:
        return read_metrics(file)[-1]["step"] if file.exists() else 0
    except (ValueError, IndexError):  # a line that is just being written
        return 0


def soak(folder: Path, minutes: float, between_s: tuple[float, float], seed: int) -> list[dict]:
    chance = random.Random(seed)
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "longring.launch.cli"]
    subprocess.run(
        [*command, "prepare", str(RECIPE), *settings(folder)], check=True, env=environment, stdout=sys.stderr
    )
    run, events = folder / "run", []
    end = time.monotonic() + 60 * minutes
    fault_at, step_then, kind = None, 0, ""
    with Progress() as progress, (folder / "output.txt").open("w") as output:
        task = progress.add_task("soak", total=60 * minutes)
        while time.monotonic() < end:
            starts = starts_of(run)
            words = [*command, "train", str(RECIPE), *settings(folder), "--ranks", "2"]
            launcher = psutil.Popen(words, env=environment, stdout=output, stderr=output)
            started, ranks = time.monotonic(), []
            try:
                while launcher.poll() is None and (starts_of(run) == starts or done(run) <= _from(run)):
                    time.sleep(0.2)
                if fault_at is not None:
                    resumed = _from(run)
                    events.append(
                        {"kind": kind, "lost_steps": max(0, step_then - resumed), "lost_s": time.monotonic() - fault_at}
                    )
                ranks = launcher.children()
                time.sleep(1)  # the records of steps that are done again are gone by now
                early: list[int] = []  # when two checkpoints are written: all buffers are there
                length = chance.uniform(*between_s)
                while time.monotonic() - started < length and time.monotonic() < end and launcher.poll() is None:
                    time.sleep(0.2)
                    if not early and done(run) >= _from(run) + 2 * EVERY + 5:
                        early = [rank.memory_info().rss for rank in ranks if rank.is_running()]
                    progress.update(task, completed=60 * minutes - (end - time.monotonic()))
                late = [rank.memory_info().rss for rank in ranks if rank.is_running()]
                if events and early and late:
                    events[-1]["grown_bytes"] = max(late) - max(early)
                    events[-1]["rss_bytes"] = max(late)
                kind = chance.choice(list(FAULTS))
                step_then, fault_at = done(run), time.monotonic()
                FAULTS[kind](launcher, chance.choice(ranks))
                launcher.wait(120)
            finally:
                for process in [*ranks, launcher]:
                    if process.is_running():
                        process.kill()
    return events


def starts_of(run: Path) -> int:
    """How often the run has started."""
    file = run / "starts.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def _from(run: Path) -> int:
    """The step from which the last start went on."""
    return json.loads((run / "starts.jsonl").read_text().splitlines()[-1])["from_step"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (default: an hour)")
    parser.add_argument("--quick", action="store_true", help="two minutes, a fault every few seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every fault")
    options = parser.parse_args()
    between = (15.0, 25.0) if options.quick else (20.0, 90.0)
    with tempfile.TemporaryDirectory() as folder:
        events = soak(Path(folder), 2.0 if options.quick else options.minutes, between, options.seed)
        steps = done(Path(folder) / "run")
    table = Table(title=f"{len(events)} faults; {steps} steps at the end, a checkpoint every {EVERY}")
    for name in (
        "fault",
        "times",
        "steps lost, mean",
        "most",
        "seconds to the next step, median",
        "memory grown, most",
    ):
        table.add_column(name, justify="left" if name == "fault" else "right")
    for kind in FAULTS:
        mine = [event for event in events if event["kind"] == kind]
        if mine:
            grown = [event["grown_bytes"] / 1e6 for event in mine if "grown_bytes" in event]
            table.add_row(
                kind,
                str(len(mine)),
                f"{statistics.mean(event['lost_steps'] for event in mine):.1f}",
                str(max(event["lost_steps"] for event in mine)),
                f"{statistics.median(event['lost_s'] for event in mine):.1f}",
                f"{max(grown):.1f} MB" if grown else "",
            )
    Console(width=120).print(table)
    if options.json:
        options.json.write_text(json.dumps(events, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
