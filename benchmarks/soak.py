"""An hour of training under random faults: steps and seconds lost, and the growth of memory.

    python benchmarks/soak.py --json rows.json --picture soak.png   # an hour
    python benchmarks/soak.py --quick  # ten minutes

`longring train` runs on two ranks with a smaller demo recipe. Each fault of `lib/faults.py` happens once a round, in
random order: processes are killed, stopped or told to stop, files cannot be read or written, the disk is full, a byte
of a shard changes. Then the same command runs again, after the command that an error advises. A checkpoint is saved
every 20 steps. Half of the times between faults are short and half long, since memory that grows shows in a long run
only.

At the end every step must be recorded once, in order, and a second run without faults trains the same steps for a part
of the time: its losses, gradient norms and weights must be equal, bit for bit.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib.faults import FAULTS, Training, small_disk
from lib.script import Row, make_parser, make_table, write_record
from longring.launch.checkpoint.format import complete_checkpoints, find_damage, read_checkpoint_manifest
from longring.launch.records import read_records
from rich.console import Console
from safetensors.torch import load_file

EVERY = 20
KEPT_EVERY = 1000
SAMPLE_S = 2.0
EXACT = ("step", "tokens", "loss", "bucket", "cp", "learning_rate", "grad_norm", "outcome")
SETTINGS = [
    "data.source.limit_documents=200",
    "data.max_bucket_tokens=512",
    "parallel.tokens_per_rank=256",
    "train.global_batch_tokens=1024",
    "train.steps=1000000",
    "train.deterministic=true",
    f"train.checkpoint_every_steps={EVERY}",
    f"train.keep_checkpoint_every_steps={KEPT_EVERY}",
    "faults.hang_minutes=0.2",
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.ffn_hidden_size=192",
]


def next_step(run: Training) -> int:
    """Wait for the next step of the run, with the same command if no start runs; return the step that it follows.

    Raises AssertionError if three starts in a row end before it.
    """
    for _ in range(3):
        if run.running:
            from_step = run.step()
            if run.wait(lambda at=from_step: run.step() > at):
                return from_step
        else:
            num_starts = len(run.records("starts.jsonl"))
            run.start()
            if run.wait(lambda count=num_starts: has_begun(run, count)):
                return run.records("starts.jsonl")[-1]["from_step"]
        run.end()
    raise AssertionError(f"three starts have ended: {run.said}")


def has_begun(run: Training, num_starts: int) -> bool:
    """Return whether a start after `num_starts` others has done a step; metrics are cut to its first step before."""
    starts, metrics = run.run / "starts.jsonl", run.run / "metrics.jsonl"
    if not metrics.exists() or len(found := run.records(starts.name)) <= num_starts:
        return False
    return metrics.stat().st_mtime_ns > starts.stat().st_mtime_ns and run.step() > found[-1]["from_step"]


def soak(run: Training, minutes: float, faults: int, between_s: tuple[float, float, float], seed: int) -> list[Row]:
    """Train for some minutes and at least `faults` faults; return a row for each and one for the beginning.

    A row has the fault and what it cost: exit statuses, steps, seconds until the next step; then samples of the time up
    to the next fault: (seconds, step, bytes of each rank). `between_s` are the shortest, middle and longest time
    between faults.
    """
    chance, began = random.Random(seed), time.monotonic()
    rows: list[Row] = []
    left: list[str] = []
    fault, happened_at, step_then = "", began, 0
    run.start()
    run.wait(lambda: complete_checkpoints(run.run / "checkpoints"))  # else the first faults would lose all steps
    while True:
        from_step = next_step(run)
        now = time.monotonic()
        row = {
            "after": fault,
            "statuses": list(run.statuses),
            "lost_steps": max(0, step_then - from_step),
            "lost_s": now - happened_at,
            "samples": [],
        }
        rows.append(row)
        told = f"{fault or 'first start'}: {row['lost_steps']} steps, {row['lost_s']:.0f} s, statuses {row['statuses']}"
        print(f"{(now - began) / 60:.1f} min, step {run.step()}: {told}", file=sys.stderr, flush=True)
        shortest, middle, longest = between_s
        stop = now + chance.choice([chance.uniform(shortest, middle), chance.uniform(middle, longest)])
        ranks = run.ranks
        while (now := time.monotonic()) < stop and run.running:
            row["samples"].append((now - began, run.step(), [rank.memory_info().rss for rank in ranks]))
            time.sleep(min(SAMPLE_S, max(0.0, stop - now)))
        if now - began > 60 * minutes and len(rows) > faults:
            return rows
        left = left or chance.sample(list(FAULTS), len(FAULTS))
        fault, happened_at, step_then = left.pop(), time.monotonic(), run.step()
        run.statuses.clear()
        FAULTS[fault][0](run, chance)


def compare(run: Training, reference: Training, minutes: float) -> Row:
    """Train the same steps without faults for some minutes; return how many steps were compared, and a checkpoint's.

    Raises AssertionError if the run has not recorded every step once, in order, or differs from the reference.
    """
    metrics = read_records(run.run / "metrics.jsonl")
    assert [step["step"] for step in metrics] == list(range(1, len(metrics) + 1)), "every step once, in order"
    reference.start("--stop-after", str(len(metrics)))
    end = time.monotonic() + 60 * minutes
    while reference.running and time.monotonic() < end:
        time.sleep(0.5)
    if reference.running:
        reference.stop()
    again = read_records(reference.run / "metrics.jsonl")
    for ours, theirs in zip(metrics, again, strict=False):
        assert [ours[key] for key in EXACT] == [theirs[key] for key in EXACT], (ours, theirs)
    of_run, of_reference = (
        {path.name: path for path in complete_checkpoints(of.run / "checkpoints")} for of in (run, reference)
    )
    last = max(of_run.keys() & of_reference.keys())
    for file in of_run[last].glob("*.safetensors"):
        ours, theirs = load_file(file), load_file(of_reference[last] / file.name)
        assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours), file
    return {"steps": len(metrics), "equal_losses_of_steps": len(again), "equal_weights_of": last}


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

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(11, 5), layout="constrained")
    colours = dict(zip(FAULTS, matplotlib.colormaps["tab20"].colors, strict=False))  # type: ignore[attr-defined]
    for row in rows:
        minutes = [seconds / 60 for seconds, *_ in row["samples"]]
        above.plot(minutes, [step for _, step, _ in row["samples"]], color="0.3", lw=1)
        for rank in (0, 1):
            megabytes = [memory[rank] / 1e6 for *_, memory in row["samples"]]
            below.plot(minutes, megabytes, color=("0.3", "0.6")[rank], lw=1)
        if row["after"] and minutes:
            for axes in (above, below):
                axes.axvline(minutes[0], color=colours[row["after"]], lw=1)
    for kind, colour in colours.items():
        above.plot([], [], color=colour, lw=1, label=kind)
    figure.legend(loc="outside right upper", fontsize="small", title="the fault before", title_fontsize="small")
    above.set_ylabel("steps done")
    below.set_ylabel("memory of a rank, MB")
    below.set_xlabel("minutes")
    below.set_ylim(bottom=0)
    figure.savefig(picture, dpi=110)


def is_unexpected(row: Row) -> bool:
    """Return whether starts have ended with other statuses than the fault may lead to."""
    return bool(row["after"]) and tuple(row["statuses"]) not in FAULTS[row["after"]][1]


def show(rows: list[Row], compared: Row) -> None:
    """Print a line for each kind of fault, the comparison with the run without faults, and the growth of memory."""
    columns = (
        "fault",
        "times",
        "exit statuses",
        "steps lost, mean",
        "most",
        "seconds to the next step, median",
        "most",
    )
    title = f"{len(rows) - 1} faults in {compared['steps']:,} steps, a checkpoint every {EVERY}"
    table = make_table(title, columns, left=("fault",))
    for kind in FAULTS:
        if mine := [row for row in rows if row["after"] == kind]:
            lost, seconds = [row["lost_steps"] for row in mine], [row["lost_s"] for row in mine]
            statuses = {", ".join(map(str, row["statuses"])) or "none" for row in mine}
            table.add_row(
                kind,
                str(len(mine)),
                " or ".join(sorted(statuses)),
                f"{statistics.mean(lost):.1f}",
                str(max(lost)),
                f"{statistics.median(seconds):.0f}",
                f"{max(seconds):.0f}",
            )
    console = Console(width=120)
    console.print(table)
    for row in filter(is_unexpected, rows):
        console.print(f"unexpected after {row['after']}: exit statuses {row['statuses']}")
    console.print(
        f"every step is recorded once; losses of steps 1 to {compared['equal_losses_of_steps']:,} and the weights of "
        f"{compared['equal_weights_of']} equal those of a run without faults, bit for bit"
    )
    long = {row["samples"][-1][1] - row["samples"][0][1]: slopes for row in rows if (slopes := growth(row["samples"]))}
    most = max((max(memory) for row in rows for *_, memory in row["samples"]), default=0)
    console.print(f"memory of a rank: at most {most / 1e6:,.0f} MB")
    if long:
        console.print("change in the second half of the long starts:")
    for num_steps, slopes in sorted(long.items()):
        told = ", ".join(f"{1000 * slope / 1e6:+.1f}" for slope in slopes)
        console.print(f"  of {num_steps:,} steps: {told} MB in 1,000 steps on ranks 0, 1")


def main() -> int:
    parser = make_parser(__doc__ or "", quick="ten minutes: one round of the faults, seconds apart")
    parser.add_argument("--minutes", type=float, default=60.0, help="length of the soak (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults (default: 0)")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw steps and memory over time")
    options = parser.parse_args()
    one_round = len(FAULTS)
    minutes, faults, between_s = {
        "full": (options.minutes, one_round, (10.0, 40.0, 240.0)),
        "quick": (5.0, one_round, (5.0, 10.0, 20.0)),
        "smallest": (0.0, 4, (0.5, 1.0, 2.0)),
    }[options.size]
    with tempfile.TemporaryDirectory() as name, small_disk(Path(name) / "run", megabytes=600):
        run = Training(Path(name), SETTINGS)
        try:
            run.command("prepare")
            rows = soak(run, minutes, faults, between_s, options.seed)
            run.stop()
            compared = compare(run, Training(Path(name), SETTINGS, "reference"), minutes=max(2.0, minutes / 4))
            [last, *_] = complete_checkpoints(run.run / "checkpoints")
            assert find_damage(last, read_checkpoint_manifest(last)) is None
        finally:
            run.kill()
    show(rows, compared)
    if options.picture:
        draw(rows, options.picture)
    write_record(options.json, {"rows": rows, "compared": compared}, indent=None)
    return int(any(is_unexpected(row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
