"""An hour of training under random faults: steps and seconds lost, and the growth of memory.

    python benchmarks/soak.py --json rows.json --picture soak.png   # an hour
    python benchmarks/soak.py --quick  # two minutes

`longring train` runs on two ranks with a smaller demo recipe. At random times a rank is killed, a rank or the launcher
gets a signal, or a rank is stopped; then the same command runs again. A checkpoint is saved every 20 steps. Half of the
times between faults are short and half long, since memory that grows shows in a long run only.
"""

from __future__ import annotations

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

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib import ROOT
from lib.script import Row, make_parser, make_table, write_record
from longring.launch.checkpoint.format import complete_checkpoints, find_damage, read_checkpoint_manifest
from longring.launch.metrics import read_metrics
from rich.console import Console
from rich.progress import Progress

RECIPE = ROOT / "launch" / "recipes" / "demo.toml"
EVERY = 20
SAMPLE_S = 2.0
FAULTS = {
    "rank killed": lambda launcher, rank: rank.kill(),
    "SIGTERM to the launcher": lambda launcher, rank: launcher.send_signal(signal.SIGTERM),
    "SIGUSR1 to a rank": lambda launcher, rank: rank.send_signal(signal.SIGUSR1),
    "rank stopped (hang)": lambda launcher, rank: rank.suspend(),
}


def settings(folder: Path) -> list[str]:
    """Return the overrides of the demo's recipe."""
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


def last_step(run: Path) -> int:
    """Return the last step in the run's metrics, or 0."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 1000))
            return json.loads(file.read().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError):  # no file yet, or a line that is being written
        return 0


def starts_of(run: Path) -> list[Row]:
    """Return the records of the starts of the run."""
    file = run / "starts.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def soak(folder: Path, minutes: float, between_s: tuple[float, float, float], seed: int) -> list[Row]:
    """Train for some minutes with faults and return a row for each start.

    A row has the fault that ended the start before, the steps and seconds that it cost, and samples of (seconds, step,
    bytes of each rank). `between_s` are the shortest, middle and longest time between faults.
    """
    chance = random.Random(seed)
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "longring.launch.cli"]
    subprocess.run(
        [*command, "prepare", str(RECIPE), *settings(folder)], check=True, env=environment, stdout=sys.stderr
    )
    run, rows = folder / "run", []
    began = time.monotonic()
    end = began + 60 * minutes
    kind, fault_at, step_then = "", 0.0, 0
    with Progress() as progress, (folder / "output.txt").open("w") as output:
        task = progress.add_task("soak", total=60 * minutes)
        while time.monotonic() < end:
            num_starts = len(starts_of(run))
            words = [*command, "train", str(RECIPE), *settings(folder), "--ranks", "2"]
            launcher = psutil.Popen(words, env=environment, stdout=output, stderr=output)
            ranks: list[psutil.Process] = []
            try:
                while launcher.poll() is None and (
                    len(starts_of(run)) == num_starts or last_step(run) <= starts_of(run)[-1]["from_step"]
                ):
                    time.sleep(0.2)
                started, from_step = time.monotonic(), starts_of(run)[-1]["from_step"]
                samples: list[tuple[float, int, list[int]]] = []
                row = {"after": kind, "from_step": from_step, "samples": samples}
                if kind:
                    row |= {"lost_steps": max(0, step_then - from_step), "lost_s": started - fault_at}
                rows.append(row)
                ranks = launcher.children()
                time.sleep(1)  # by now the records of steps that are done again are gone
                shortest, middle, longest = between_s
                length = chance.choice([chance.uniform(shortest, middle), chance.uniform(middle, longest)])
                stop = min(end, started + length)
                while (now := time.monotonic()) < stop and launcher.poll() is None:
                    samples.append((now - began, last_step(run), [rank.memory_info().rss for rank in ranks]))
                    progress.update(task, completed=now - began)
                    time.sleep(min(SAMPLE_S, max(0.0, stop - now)))
                kind = chance.choice(list(FAULTS))
                step_then, fault_at = last_step(run), time.monotonic()
                FAULTS[kind](launcher, chance.choice(ranks))
                launcher.wait(120)
            finally:
                for process in [*ranks, launcher]:
                    if process.is_running():
                        process.kill()
        progress.update(task, completed=60 * minutes)
    return rows


def growth(samples: list[tuple[float, int, list[int]]]) -> list[float]:
    """Return by rank the bytes a step by which memory grows in the second half of a long start, by a line's slope."""
    late = samples[len(samples) // 2 :]
    if len(late) < 30:
        return []
    steps = np.array([step for _, step, _ in late])
    return [float(np.polyfit(steps, np.array(memory), 1)[0]) for memory in zip(*(m for *_, m in late), strict=True)]


def draw(rows: list[Row], picture: Path) -> None:
    """Draw the steps and the ranks' memory over time, with a mark at each fault."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(9, 5), layout="constrained")
    colours = dict(zip(FAULTS, ("C3", "C0", "C2", "C1"), strict=True))
    for row in rows:
        minutes = [seconds / 60 for seconds, *_ in row["samples"]]
        above.plot(minutes, [step for _, step, _ in row["samples"]], color="0.3", lw=1)
        for rank in (0, 1):
            megabytes = [memory[rank] / 1e6 for *_, memory in row["samples"]]
            below.plot(minutes, megabytes, color=("0.3", "0.6")[rank], lw=1)
        if row["after"] and minutes:
            for axes in (above, below):
                axes.axvline(minutes[0], color=colours[row["after"]], lw=0.8)
    for kind, colour in colours.items():
        above.plot([], [], color=colour, lw=0.8, label=kind)
    above.legend(fontsize="small", title="ended the start before", title_fontsize="small")
    above.set_ylabel("steps done")
    below.set_ylabel("memory of a rank, MB")
    below.set_xlabel("minutes")
    below.set_ylim(bottom=0)
    figure.savefig(picture, dpi=110)


def show(rows: list[Row], steps: int) -> None:
    """Print a line for each kind of fault, and the growth of memory."""
    num_faults = sum(bool(row["after"]) for row in rows)
    columns = ("fault", "times", "steps lost, mean", "most", "seconds to the next step, median", "most")
    title = f"{num_faults} faults in {steps:,} steps, a checkpoint every {EVERY}"
    table = make_table(title, columns, left=("fault",))
    for kind in FAULTS:
        if mine := [row for row in rows if row["after"] == kind]:
            lost, seconds = [row["lost_steps"] for row in mine], [row["lost_s"] for row in mine]
            table.add_row(
                kind,
                str(len(mine)),
                f"{statistics.mean(lost):.1f}",
                str(max(lost)),
                f"{statistics.median(seconds):.1f}",
                f"{max(seconds):.1f}",
            )
    console = Console(width=120)
    console.print(table)
    long = {row["samples"][-1][1] - row["samples"][0][1]: slopes for row in rows if (slopes := growth(row["samples"]))}
    most = max((max(memory) for row in rows for *_, memory in row["samples"]), default=0)
    console.print(f"memory of a rank: at most {most / 1e6:,.0f} MB")
    if long:
        console.print("change in the second half of the long starts:")
    for num_steps, slopes in sorted(long.items()):
        told = ", ".join(f"{1000 * slope / 1e6:+.1f}" for slope in slopes)
        console.print(f"  of {num_steps:,} steps: {told} MB in 1,000 steps on ranks 0, 1")


def main() -> int:
    parser = make_parser(__doc__ or "", quick="two minutes, a fault every few seconds")
    parser.add_argument("--minutes", type=float, default=60.0, help="length of the soak (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults (default: 0)")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw steps and memory over time")
    options = parser.parse_args()
    minutes, between_s = {
        "full": (options.minutes, (15.0, 90.0, 480.0)),
        "quick": (2.0, (5.0, 15.0, 25.0)),
        "smallest": (0.5, (1.0, 2.0, 3.0)),
    }[options.size]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = soak(folder, minutes, between_s, options.seed)
        steps = [step["step"] for step in read_metrics(folder / "run" / "metrics.jsonl")]
        assert steps == list(range(1, len(steps) + 1)), "every step is recorded once, in order, whatever happened"
        if checkpoints := complete_checkpoints(folder / "run" / "checkpoints"):
            assert find_damage(checkpoints[0], read_checkpoint_manifest(checkpoints[0])) is None
    show(rows, len(steps))
    if options.picture:
        draw(rows, options.picture)
    write_record(options.json, {"rows": rows}, indent=None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
