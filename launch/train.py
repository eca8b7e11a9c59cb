"""The training of a run: one loop, to be read from top to bottom.

    torchrun --nproc-per-node 4 -m longring.launch.train launch/recipes/demo.toml [key=value ...]

or `longring train RECIPE`, which starts the ranks itself. A start continues from the run's last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from rich.console import Console

from ..data.files import write_text
from ..data.read.knots import Knots
from ..data.read.loader import Loader
from ..data.tasks.catalog import chosen_tasks
from ..parallel.meet import meet
from ..parallel.mesh import Mesh, join
from ..parallel.world import World
from ..parallel.zero import DeepSpeedEngine
from .build import build_engine, open_layouts
from .checkpoint.format import TrainState
from .checkpoint.load import load_last_good
from .checkpoint.retention import clear_leftovers
from .checkpoint.save import Saver
from .config import Recipe, load_recipe
from .errors import GO_ON_LATER
from .evaluation.buckets import held_out_buckets
from .fit.start import predicted
from .identity import changes
from .loss_watch import LossWatch
from .metrics import MetricsWriter
from .opening import opening
from .preflight import Preflight, check_nothing_was_saved, preflight_together
from .ranks.logs import open_log
from .ranks.node import environment
from .ranks.rank import as_rank
from .ranks.signals import StopSignals
from .ranks.watchdog import Watchdog
from .settings import flat, to_tree
from .together import on_all_ranks, on_rank_0
from .trackers import open_trackers
from .trainer import Trainer, share_of
from .weights.begin import load_origin
from .weights.origin import keep_published


def train(recipe: Recipe, console: Console, stop_after: int | None = None) -> int:
    """Train until recipe.train.steps, or until `stop_after` steps are done and saved. Collective.

    Returns 0, or GO_ON_LATER after a signal, when all finished steps are saved. However a start ends, the same command
    continues the run. Raises ValueError if the start does not fit its run, data or ranks, OSError if a file cannot be
    read or written, ArithmeticError if the numbers of a step end the run, ConnectionError if another rank is gone.
    """
    world = World.from_environment()
    world_size, rank = world.size, world.rank
    hang_minutes, timeout_minutes = recipe.faults.hang_minutes, recipe.faults.collective_minutes
    store = meet(world, timedelta(minutes=timeout_minutes))
    checked = preflight_together(recipe, store, world, stop_after)
    run, last = checked.run, min(recipe.train.steps, stop_after or recipe.train.steps)
    if checked.steps_done >= last:
        if rank == 0:
            console.print(f"{run.path} has its {checked.steps_done} steps already: nothing to train")
        return 0

    open_log(run.log_file(rank))
    use_deterministic_operations(recipe.train.deterministic)
    mesh = join(recipe.parallel, recipe.max_context_parallel, timeout_minutes, store)
    # The contexts are left in reverse: the trainer's threads end under the watchdog, and the lock is released last.
    with (
        run.held() if rank == 0 else nullcontext(),
        StopSignals() as signals,
        Watchdog(run, rank, world_size, 60 * hang_minutes) as watchdog,
        start(recipe, checked, mesh, signals, watchdog, last, console) as trainer,
    ):
        if trainer.evaluations.are_owed(trainer.state.step):  # a signal has ended an earlier start during this one
            trainer.evaluate()
        while trainer.state.step < last and not trainer.stopped_by:
            trainer.renew()  # before the step, whose batch may depend on the new shares
            metrics = trainer.train_step()
            if metrics.outcome == "spike" and trainer.go_back(metrics):
                continue  # the weights are now those of a checkpoint: there is nothing to save
            if trainer.evaluations.are_due(trainer.state.step) and not trainer.stopped_by:
                trainer.evaluate()
            due = metrics.step % recipe.train.checkpoint_every_steps == 0
            if due or metrics.step == last or trainer.stopped_by:
                trainer.save()
        trainer.finish_saving()

    if rank == 0:
        trainer.report()
    if trainer.state.step < last:
        trainer.tell("stopped", trainer.state.step, f"{trainer.stopped_by}: saved; the same command continues the run")
        return GO_ON_LATER
    return 0


def start(
    recipe: Recipe,
    checked: Preflight,
    mesh: Mesh,
    signals: StopSignals,
    watchdog: Watchdog,
    last: int,
    console: Console,
) -> Trainer:
    """Build the model, load the last good checkpoint and divide the buckets among the ranks. Collective.

    Raises ValueError if all checkpoints are damaged or fit other data, or if ranks would divide sequences differently,
    and CommonError if a file of the run cannot be read or written.
    """
    run, order, rank_0 = checked.run, checked.order, mesh.rank == 0
    on_all_ranks(mesh, lambda: open_run_directory(checked, mesh))
    watchdog.at(checked.steps_done, "building the model and loading the checkpoint")
    if recipe.train.evaluate_every_steps:  # raises here, not hours later, if no evaluation is possible
        chosen_tasks(recipe.evaluate.tasks)
        held_out_buckets(recipe, checked.manifest)
    engine = build_engine(recipe, checked.manifest.vocab_size, mesh)
    state, changed = resume(engine, checked, mesh, console)
    # The first step is known only now, since the checkpoint that seemed the last may have been damaged.
    on_rank_0(mesh, lambda: record(checked, state, changed, mesh.world_size, console))
    if rank_0:
        for line in opening(recipe, order, engine, mesh, checked.manifest.vocab_size):
            console.print(line, soft_wrap=True, highlight=False)
    at = partial(watchdog.at, state.step)
    layouts = open_layouts(recipe, mesh, order.lengths, at, console if rank_0 else None, run.attention_file)
    for layout in layouts.values():  # the layout keeps plans and masks of whole sequences: no step waits for them
        layout.prepare(layout.sequences_per_replica, None)
    knots = Knots(recipe.knots, checked.manifest.tokenizer(), recipe.train.seed) if recipe.knots.share else None
    loader = Loader(
        checked.manifest,
        order,
        recipe.loader,
        lambda length: share_of(layouts[length]),
        pin_memory=mesh.device.type == "cuda",
        knots=knots,
        prepare=lambda length, num_rows, starts: layouts[length].prepare(num_rows, starts),
        hashed_by=(mesh.rank, mesh.world_size),
    )
    return Trainer(
        recipe=recipe,
        checked=checked,
        mesh=mesh,
        console=console,
        signals=signals,
        watchdog=watchdog,
        last=last,
        engine=engine,
        layouts=layouts,
        loader=loader,
        losses=LossWatch(recipe.faults, state.recent_losses),
        saver=Saver(engine, run, mesh, recipe.train, recipe.faults.max_failed_saves, progress=watchdog.alive),
        writer=on_all_ranks(mesh, lambda: open_writer(checked, state, console) if rank_0 else None),
        state=state,
    )


def open_writer(checked: Preflight, state: TrainState, console: Console) -> MetricsWriter:
    """Return the writer of the metrics after the steps done, with the trackers of the recipe. Rank 0 only."""
    recipe, run = checked.recipe, checked.run
    trackers = open_trackers(recipe.track, run.tensorboard, state.run, state.step, to_tree(recipe))
    return MetricsWriter(run, trackers, state.step, recipe.train.steps, console)


def open_run_directory(checked: Preflight, mesh: Mesh) -> None:
    """Make the run directory and clear the leftovers of a crash; check that each node can write logs and checkpoints.

    Raises OSError if a node cannot, or if another start has begun the run while this one waited for its lock.
    """
    run = checked.run
    if mesh.rank == 0:
        if run.run_id() not in (None, checked.identity.run):
            raise OSError(
                f"run_directory = {run.path}: another start has begun this run since this one looked; give the same "
                "command again, and it continues that run"
            )
        run.create(checked.recipe)
        write_text(run.tokenizer_file, checked.manifest.tokenizer_json())
        if checked.origin:
            keep_published(checked.origin, run)
        if not checked.steps_done:  # the losses of a run that was killed before its first checkpoint
            run.renewals_file.unlink(missing_ok=True)
        clear_leftovers(run.checkpoints)  # rank 0 holds the lock, so no other start is saving
    if World.from_environment().local_rank == 0:
        run.check_writable()


def resume(
    engine: DeepSpeedEngine, checked: Preflight, mesh: Mesh, console: Console
) -> tuple[TrainState, dict[str, tuple[Any, Any]]]:
    """Load the last good checkpoint, which any mesh may have written. Collective.

    Returns the state to continue from, and (value in the checkpoint, value now) of every changed setting and version,
    by key. Raises ValueError as `load_last_good` does.
    """
    first = TrainState(
        step=0,
        **vars(checked.identity),
        world_size=mesh.world_size,
        tensor=mesh.tensor_size,
        zero_stage=checked.recipe.parallel.zero_stage,
    )
    loaded = load_last_good(engine, checked.run.checkpoints, mesh, checked.check_checkpoint)
    if loaded is None:
        # The preflight has checked it too, but a disk may have been unmounted since.
        on_rank_0(mesh, lambda: check_nothing_was_saved(checked.run))
        if origin := checked.origin:
            moments = checked.recipe.init.moments
            load_origin(engine, origin, mesh, moments=moments)
            if mesh.rank == 0:
                what = "weights and moments" if moments else "weights"
                console.print(f"{what} from step {origin.step} of {origin.checkpoint}", soft_wrap=True)
        return first, {}
    path, saved, damaged = loaded
    changed = changes({**flat(saved.recipe), **saved.software}, {**flat(first.recipe), **first.software})
    if mesh.rank == 0:
        for problem in damaged:
            checked.run.record_event("damaged checkpoint", saved.step, problem)
            console.print(f"damaged: {problem}; going back to {path.name}", soft_wrap=True)
        console.print(f"resumed from {path}", soft_wrap=True)
        for name in ("world_size", "tensor", "zero_stage"):
            if (then := getattr(saved, name)) != (now := getattr(first, name)):
                console.print(f"  {name} was {then} there and is {now} now: losses are equal up to rounding")
        if changed:
            told = ", ".join(f"{key} from {then!r} to {now!r}" for key, (then, now) in changed.items())
            console.print(f"  changed since: {told}", soft_wrap=True, highlight=False, markup=False)
    # The mesh of the state is the one that trains from here on; the rest continues.
    return replace(first, step=saved.step, skipped=saved.skipped, recent_losses=saved.recent_losses), changed


def record(
    checked: Preflight, state: TrainState, changed: dict[str, tuple[Any, Any]], world_size: int, console: Console
) -> None:
    """Put damaged lines of the run's records aside, and record this start in the run directory. Rank 0 only."""
    for moved in checked.run.put_bad_records_aside():
        checked.run.record_event("damaged records", state.step, moved)
        console.print(f"[bold red]damaged:[/] {moved}", soft_wrap=True)
    checked.run.record_start(
        {
            "from_step": state.step,
            "run": state.run,
            "identity": checked.identity.digest,
            "origin": checked.origin and checked.origin._asdict(),
            "changed": {key: {"before": then, "now": now} for key, (then, now) in changed.items()},
            "world_size": world_size,
            "predicted": predicted(
                checked.recipe,
                world_size,
                checked.manifest.vocab_size,
                torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                checked.order.lengths,
            ),
            "versions": checked.identity.software,
            "environment": environment(),
        }
    )


def use_deterministic_operations(deterministic: bool) -> None:
    """Restrict this process to bitwise reproducible operations if `deterministic`, else allow all operations."""
    if deterministic:
        # cuBLAS and NCCL read these when they start, so they are set before the first use of the GPU.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(deterministic)
    # No operation here reads uninitialized memory, and filling all of it costs far more than the operations do.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rank of a training run, as torchrun starts it; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m longring.launch.train",
        description="One rank of a training run; start it by torchrun, or use `longring train`.",
        epilog="example: torchrun --nproc-per-node 4 -m longring.launch.train launch/recipes/demo.toml train.steps=40",
    )
    parser.add_argument("recipe", help="TOML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings that replace the recipe's"
    )
    parser.add_argument("--stop-after", type=int, metavar="STEP", help="save and end after this step")
    options = parser.parse_intermixed_args(arguments)
    return as_rank(
        lambda: train(
            load_recipe(options.recipe, options.overrides), Console(markup=False), stop_after=options.stop_after
        )
    )


if __name__ == "__main__":
    sys.exit(main())
