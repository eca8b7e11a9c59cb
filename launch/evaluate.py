"""`longring evaluate`: held-out loss by bucket and by position in the context, on the mesh that trained the model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch._C._distributed_c10d import Store

from ..data.files import write_text
from ..data.tasks.catalog import chosen_tasks
from ..parallel.meet import meet
from ..parallel.mesh import Mesh, join
from ..parallel.world import World
from .build import build_engine, open_layouts
from .config import FaultsConfig, Recipe
from .evaluation.buckets import held_out_buckets
from .evaluation.key_tokens import KeyTokens
from .evaluation.long_context import judge
from .evaluation.measure import Measurement
from .ranks.logs import open_log
from .ranks.rank import as_rank
from .ranks.watchdog import Watchdog
from .report.evaluation_tables import evaluation_tables, left_out_tables, long_context_tables
from .run_directory import RunDirectory
from .target import Target, target_of_run, target_of_weights
from .together import on_rank_0


def evaluate(recipe: Recipe, console: Console, keys: Path | None = None) -> dict[str, Any] | None:
    """Evaluate the last checkpoint of the recipe's run; return the content of evaluation.json on rank 0, else None.

    Losses are means over the tokens read, in nats. The unigram baseline knows the train split's token counts and
    nothing of the context. `keys` is the file of a judge's key tokens, which rank 0 reads. Raises ValueError if there
    is no checkpoint, or no held-out sequence that is short enough, and ConnectionError if another rank is gone.
    Collective.
    """
    world = World.from_environment()
    store = meet(world, timedelta(minutes=recipe.faults.collective_minutes))
    target = target_of_run(recipe, store, world)
    result = _evaluate(target, world, store, console, keys)
    if result is not None:
        target.run.record_evaluation(result)
    return result


def evaluate_weights(
    path: Path,
    data: str,
    overrides: Sequence[str],
    logs: Path,
    console: Console,
    keys: Path | None = None,
    choose_keys: Path | None = None,
) -> dict[str, Any] | None:
    """Evaluate weights on other data, as `target_of_weights` says; return the result on rank 0, else None. Collective.

    With `choose_keys` they only judge which tokens are the key tokens of LongPPL, and write them to that file. Raises
    ValueError and ConnectionError as `evaluate` does.
    """
    world = World.from_environment()
    store = meet(world, timedelta(minutes=FaultsConfig().collective_minutes))
    target = target_of_weights(path, data, overrides, RunDirectory(logs), store, world)
    return _evaluate(target, world, store, console, keys, choose_keys)


def _evaluate(
    target: Target,
    world: World,
    store: Store,
    console: Console,
    keys: Path | None = None,
    choose_keys: Path | None = None,
) -> dict[str, Any] | None:
    """Evaluate a target and print its tables; return the result on rank 0, else None. Collective."""
    recipe, faults = target.recipe, target.recipe.faults
    lengths = [bucket.length for bucket, _ in held_out_buckets(recipe, target.manifest)]
    open_log(target.run.log_file(world.rank))
    mesh = join(recipe.parallel, recipe.max_context_parallel, faults.collective_minutes, store)
    with Watchdog(target.run, world.rank, world.size, 60 * faults.hang_minutes) as watchdog:
        step, measurement = opened(target, mesh, watchdog, lengths)
        if choose_keys is not None:
            chosen = judge(target.name, recipe.evaluate, target.manifest, measurement.scorers())
            return chosen.save(choose_keys) if world.rank == 0 else None  # None on every rank: no result
        if keys is not None:
            measurement = replace(measurement, keys=on_rank_0(mesh, lambda: KeyTokens.load(keys)))
        measured = measurement.measure()
    if world.rank != 0:
        return None
    result = {"target": target.name, "step": step, **measured}
    console.print(*evaluation_tables(result), *long_context_tables(result), *left_out_tables(result))
    return result


def opened(target: Target, mesh: Mesh, watchdog: Watchdog, lengths: Sequence[int]) -> tuple[int, Measurement]:
    """Return the step of a target's weights, and the measurement of its buckets of these lengths. Collective."""
    recipe, manifest = target.recipe, target.manifest
    chosen_tasks(recipe.evaluate.tasks)  # raises for a wrong name before the model is built
    watchdog.at(0, "building the model and loading the weights")
    engine = build_engine(recipe, manifest.vocab_size, mesh)
    step = target.load(engine, mesh)
    at = partial(watchdog.at, step)
    layouts = open_layouts(recipe, mesh, lengths, at)
    return step, Measurement.of(recipe, manifest, mesh, engine, layouts, at)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rank of an evaluation, as torchrun starts it; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m longring.launch.evaluate",
        description="One rank of an evaluation; start it by torchrun, or use `longring evaluate`.",
        epilog="example: torchrun --nproc-per-node 4 -m longring.launch.evaluate runs/demo",
    )
    parser.add_argument("target", help="run directory, or with --data any weights")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="settings that replace the run's")
    parser.add_argument("--data", default="", help="prepared data or a recipe, instead of the run's own data")
    parser.add_argument(
        "--reports", type=Path, default=Path("evaluation-reports"), metavar="DIR", help="logs, with --data"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--quiet", action="store_true", help="print no tables")
    parser.add_argument("--keys", type=Path, metavar="FILE", help="key tokens of LongPPL that a judge has chosen")
    parser.add_argument("--choose-keys", type=Path, metavar="FILE", help="only choose key tokens; with --data")
    options = parser.parse_intermixed_args(arguments)
    console = Console(quiet=options.quiet)

    def work() -> None:
        if options.data:
            target, keys = Path(options.target), (options.keys, options.choose_keys)
            result = evaluate_weights(target, options.data, options.overrides, options.reports, console, *keys)
        else:
            result = evaluate(RunDirectory(options.target).recipe(options.overrides), console, options.keys)
        if result is not None and options.json:
            write_text(options.json, json.dumps(result, indent=2) + "\n")

    return as_rank(work)


if __name__ == "__main__":
    sys.exit(main())
