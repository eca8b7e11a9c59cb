"""`make demo`: prepare, train, stop, resume, evaluate and draw, on the documents of Python's standard library."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from . import cli
from .config import Recipe, load_recipe
from .records import read_records
from .report.picture import draw_run
from .run_directory import RunDirectory
from .tables import plain_table

RECIPE = Path(__file__).parent / "recipes" / "demo.toml"
NATS_BELOW_UNIGRAM = 0.5
"""Least distance of the held-out loss from the unigram baseline; over initial weights it is 0.9 to 1.2."""


def main() -> int:
    """Run every stage of the demo as the command that a user would type; return an exit status."""
    console = Console()
    recipe = load_recipe(RECIPE)
    half = recipe.train.steps // 2
    run = RunDirectory(recipe.run_directory)
    reference = RunDirectory(f"{recipe.run_directory}-uninterrupted")
    # The run to compare with needs only some steps beyond the stop.
    compared = half + recipe.train.steps // 8
    stages = [
        (
            "Prepare: tokenize Python's standard library, cut it into sequences by bucket and write shards",
            ["prepare", str(RECIPE)],
        ),
        (
            f"Train on {recipe.train.ranks_per_node} ranks; save and stop after half of the {recipe.train.steps} steps",
            ["train", str(RECIPE), "--stop-after", str(half)],
        ),
        (
            "Start again: new processes continue from the checkpoint",
            ["train", str(RECIPE)],
        ),
        (
            f"Train again without the stop, {compared} steps, to compare",
            ["train", str(RECIPE), f"run_directory={reference.path}", "--stop-after", str(compared)],
        ),
        (
            "Evaluate on held-out documents",
            ["evaluate", str(run.path)],
        ),
    ]
    started = time.perf_counter()
    for number, (title, command) in enumerate(stages, start=1):
        console.print(Panel(f"{title}\n[dim]$ longring {' '.join(command)}", title=f"{number} of {len(stages)}"))
        began = time.perf_counter()
        status = cli.main(command)
        if status:
            return status
        console.print(f"[dim]{time.perf_counter() - began:.0f} s[/]\n", highlight=False)
    evaluation = json.loads(run.evaluation_file.read_text())
    draw_run(run, evaluation)
    equal = _equal_steps(run, reference, half, compared)
    console.print(_summary(recipe, run, evaluation, equal, half))
    console.print(f"picture: {run.picture_file}   all files: {run.path}/   {time.perf_counter() - started:.0f} s")
    if equal < compared - half:
        console.print("[bold red]error:[/] the resumed steps differ from those of the uninterrupted run")
        return 1
    if evaluation["loss"] > evaluation["unigram_loss"] - NATS_BELOW_UNIGRAM:
        console.print(
            f"[bold red]error:[/] held-out loss {evaluation['loss']:.3f} is not {NATS_BELOW_UNIGRAM} nats below the "
            f"unigram baseline {evaluation['unigram_loss']:.3f}"
        )
        return 1
    return 0


def _equal_steps(run: RunDirectory, reference: RunDirectory, first: int, last: int) -> int:
    """Return the number of steps in (first, last] with bitwise equal metrics in both runs."""
    ours, theirs = ({step["step"]: step for step in read_records(r.metrics_file)} for r in (run, reference))
    exact = ("loss", "grad_norm", "bucket", "tokens", "learning_rate")
    return sum(all(ours[s][key] == theirs[s][key] for key in exact) for s in range(first + 1, last + 1))


def _summary(recipe: Recipe, run: RunDirectory, evaluation: dict, equal: int, half: int) -> Table:
    """Return a table of the results."""
    steps = read_records(run.metrics_file)
    table = plain_table("Results of the demo")
    at_once = recipe.parallel.tokens_per_rank
    table.add_row("trained", f"{steps[-1]['tokens']:,} tokens in {len(steps)} steps, {at_once} on each rank")
    for degree in sorted({step["cp"] for step in steps}):
        chosen = [step for step in steps if step["cp"] == degree]
        lengths = sorted({step["bucket"] for step in chosen})
        rate = sorted(step["tokens_per_s"] for step in chosen)[len(chosen) // 2]
        where = "on one rank" if degree == 1 else f"over {degree} ranks"
        table.add_row(
            f"  {', '.join(f'{length:,}' for length in lengths)} tokens",
            f"{len(chosen)} steps {where}, median {rate:,.0f} tok/s",
        )
    first, last = (sum(step["loss"] for step in part) / len(part) for part in (steps[:20], steps[-20:]))
    table.add_row("training loss", f"{first:.3f} over the first 20 steps, {last:.3f} over the last 20")
    table.add_row("held-out loss", f"{evaluation['loss']:.3f}, unigram baseline {evaluation['unigram_loss']:.3f}")
    table.add_row("resume", f"{equal} steps after step {half} are bitwise equal to the run without the stop")
    return table


if __name__ == "__main__":
    sys.exit(main())
