"""Training: one loop, read from top to bottom.

    torchrun --nproc-per-node 4 -m longring.launch.train launch/recipes/demo.toml [key=value ...]

or `longring train RECIPE`, which starts the ranks itself. Goes on from the run directory's last checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from ..data.read.batch_order import Share
from ..data.read.knots import Knots
from ..data.read.loader import Loader, MicroBatch
from ..parallel.mesh import Mesh, join
from ..parallel.zero import DeepSpeedEngine, gradient_norm, set_learning_rate
from .build import bucket_layouts, build_engine
from .checkpoint.format import TrainState, checkpoint_name, clear_leftovers
from .checkpoint.load import load_last_good
from .checkpoint.save import Saver, Status
from .config import Recipe, TrainConfig, load_recipe
from .errors import GO_ON_LATER, CommonError
from .grids.decide import decide_grids
from .loss_watch import LossWatch
from .metrics import MetricsWriter, StepMetrics, trained_table
from .preflight import Plan, plan
from .ranks.logs import open_log
from .ranks.node import environment
from .ranks.rank import as_rank
from .ranks.signals import StopSignals
from .ranks.watchdog import Watchdog

log = logging.getLogger(__name__)


def learning_rate(step: int, train: TrainConfig) -> float:
    """Rate of `step` (from 1): linear from 0 over warmup_steps, then half a cosine down to min_learning_rate."""
    if step <= train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    progress = (step - train.warmup_steps) / (train.steps - train.warmup_steps)
    return (
        train.min_learning_rate
        + (train.learning_rate - train.min_learning_rate) * (1 + math.cos(math.pi * progress)) / 2
    )


def train(recipe: Recipe, console: Console, stop_after: int | None = None) -> int:
    """Train until recipe.train.steps, or until `stop_after` steps are done and saved. Collective.

    Returns 0, or GO_ON_LATER after a signal: what is done is saved. However it ends, the same command goes on.
    """
    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    planned = plan(recipe, world_size, check_shards=rank == 0)
    run, order, faults = planned.run, planned.order, recipe.faults
    last = min(recipe.train.steps, stop_after or recipe.train.steps)
    if planned.done >= last:
        if rank == 0:
            console.print(f"{run.path} has its {planned.done} steps already; nothing to train")
        return 0

    open_log(run.log_file(rank))
    use_deterministic_operations(recipe.train.deterministic)
    # The watchdog knows more of a hang than the collectives' own timeout, so it shall be first.
    mesh = join(recipe.parallel, recipe.max_context_parallel, timeout_minutes=max(10, 2 * faults.hang_minutes))

    def tell(event: str, at_step: int, message: str) -> None:
        log.warning("step %d, %s: %s", at_step, event, message)
        if rank == 0:
            run.record_event(event, at_step, message)
            console.print(f"step {at_step}, {event}: {message}", highlight=False, soft_wrap=True)

    with (
        run.held() if rank == 0 else nullcontext(),
        StopSignals() as signals,
        Watchdog(run, rank, world_size, 60 * faults.hang_minutes) as watchdog,
    ):
        if rank == 0:
            run.create(recipe)
            clear_leftovers(run.checkpoints)
        watchdog.at(planned.done, "building the model and loading the checkpoint")
        engine = build_engine(recipe, planned.manifest.vocab_size, mesh)
        state = resume(engine, planned, recipe, mesh, console)
        step, skipped, losses = state.step, [*state.skipped], LossWatch(faults, state.recent_losses)
        if rank == 0:
            run.record_start(world_size, from_step=step, environment=environment())
        writer = MetricsWriter(run, step, recipe.train.steps, console) if rank == 0 else None
        saver = Saver(engine, run, mesh, recipe.train, faults.max_failed_saves, progress=watchdog.alive)
        watchdog.at(step, "dividing attention among ranks")
        grids = decide_grids(recipe, mesh, order.lengths, console if rank == 0 else None)
        here_of = bucket_layouts(recipe, mesh, order.lengths, grids)
        shares = {
            length: Share(here.replica, here.num_replicas, here.sequences_per_replica)
            for length, here in here_of.items()
        }
        pin_memory = mesh.device.type == "cuda"
        knots = Knots(recipe.knots, planned.manifest.tokenizer(), recipe.train.seed) if recipe.knots.share else None
        loader = Loader(planned.manifest, order, recipe.loader, shares.__getitem__, pin_memory=pin_memory, knots=knots)
        micro_batches = loader.batches(step, last)
        accumulation_steps = recipe.accumulation_steps(world_size)
        left_out: set[int] = set()
        stopped_by = None
        try:
            while step < last and not stopped_by:
                step += 1
                started = time.perf_counter()
                rate = learning_rate(step, recipe.train)
                set_learning_rate(engine, rate)
                length = order.lengths[order.bucket(step)]
                here = here_of[length]
                batches = read_step(micro_batches, accumulation_steps, step, rank, watchdog)
                targets = recipe.train.global_batch_tokens
                if knots is not None:
                    batches = list(batches)
                    targets = trained_targets(batches, here.context_parallel, mesh)
                # The engine averages gradients over data ranks and accumulation steps; the loss of a step is the mean
                # over the trained targets of the global batch, wherever they lie.
                loss_scale = mesh.data_size * accumulation_steps / targets
                loss_sum = torch.zeros((), dtype=torch.float64, device=mesh.device)
                for number, micro_batch in enumerate(batches):
                    if step in left_out:
                        continue
                    watchdog.at(step, f"forward and backward of micro-batch {number} of bucket {length}")
                    inputs = here.model_inputs(micro_batch.rows, micro_batch.document_starts, mesh.device)
                    token_losses = engine(*inputs)
                    token_losses = token_losses * here.trained(micro_batch.trained, token_losses)
                    engine.backward(token_losses.sum() * loss_scale)
                    engine.step()
                    loss_sum += token_losses.detach().sum(dtype=torch.float64)
                watchdog.at(step, "agreeing with the other ranks")
                edge = agree(loss_sum, signals.received is not None, saver.status, mesh)
                if edge.num_stopped:
                    stopped_by = signals.received or "a signal to another rank"
                saver.settle(edge.num_written, edge.num_failed)
                loss, grad_norm, outcome = math.nan, math.nan, "left out"
                if step not in left_out:
                    loss, grad_norm = edge.loss_sum / targets, gradient_norm(engine)
                    outcome = losses.judge(step, loss, grad_norm)
                if outcome in ("non-finite", "left out"):
                    skipped.append(step)
                if outcome == "non-finite":
                    sequences = order.sequences(step, shares[length]).tolist()
                    log.warning("step %d is not finite; sequences %s of bucket %d", step, sequences, length)
                    tell("step skipped", step, f"gradients are not finite, bucket {length}; logs/ name its sequences")
                seconds = time.perf_counter() - started
                if writer is not None:
                    writer.write(
                        StepMetrics(
                            step=step,
                            tokens=(step - len(skipped)) * recipe.train.global_batch_tokens,
                            targets=targets,
                            loss=loss,
                            bucket=length,
                            cp=here.context_parallel,
                            learning_rate=rate,
                            grad_norm=grad_norm,
                            step_ms=seconds * 1e3,
                            tokens_per_s=recipe.train.global_batch_tokens / seconds,
                            outcome=outcome,
                        )
                    )
                if outcome == "spike":
                    watchdog.at(step, "going back before a loss spike")
                    saver.finish()
                    before = load_last_good(engine, run.checkpoints, mesh, planned.data_hash)
                    losses.rewound(step, loss, before and before[1])
                    if before is not None:
                        left_out.update(range(step - faults.spike_skip_steps + 1, step + 1))
                        back = f"back to step {before[1].step}, leaving out steps {sorted(left_out)}"
                        tell("spike", step, f"loss {loss:.4g}: {back}")
                        step, skipped = before[1].step, [*before[1].skipped]
                        micro_batches.close()
                        micro_batches = loader.batches(step, last)
                        if writer is not None:
                            writer.rewind(step)
                        continue
                if step == last or stopped_by or step % recipe.train.checkpoint_every_steps == 0:
                    watchdog.at(step, "saving")
                    saver.finish()
                    waited = saver.begin(replace(state, step=step, skipped=tuple(skipped), recent_losses=losses.recent))
                    log.info("saving step %d: training waited %.0f ms", step, waited * 1e3)
            if not saver.finish():
                raise CommonError(
                    f"step {step} could not be saved; the same command goes on from the checkpoint before"
                )
        except ArithmeticError:
            saver.finish()  # all ranks are here
            raise
        finally:
            saver.close()
            micro_batches.close()
            if writer is not None:
                writer.close()
    if rank == 0:
        console.print(f"saved {run.checkpoints / checkpoint_name(step)}", soft_wrap=True)
        if last == recipe.train.steps == step:
            console.print(trained_table(order.trained(last)))
            if skipped:
                console.print(f"{len(skipped)} of the {last} steps changed no weights: {run.events_file} says why")
    if step < last:
        tell("stopped", step, f"{stopped_by}: saved, and the same command goes on")
        return GO_ON_LATER
    return 0


class Edge(NamedTuple):
    """What all ranks know at the edge between two steps."""

    loss_sum: float
    num_stopped: int
    """Ranks that have got a signal."""
    num_written: int
    num_failed: int
    """Ranks that have written their part of the save in flight, or have failed to."""


def agree(loss_sum: Tensor, stopped: bool, saving: Status, mesh: Mesh) -> Edge:
    """One sum over the world, once a step: so that no rank stops, saves or gives up alone. Collective."""
    votes = [stopped, saving == "written", saving == "failed"]
    total = torch.tensor([0.0, *map(float, votes)], dtype=torch.float64, device=mesh.device)
    if mesh.tensor_rank == 0:  # the ranks of a tensor-parallel group have the same losses
        total[0] = loss_sum
    dist.all_reduce(total)
    loss, *counts = total.tolist()
    return Edge(loss, *map(int, counts))


def read_step(
    micro_batches: Iterator[MicroBatch], count: int, step: int, rank: int, watchdog: Watchdog
) -> Iterator[MicroBatch]:
    """A step's micro-batches, each read when it is asked for."""
    for number in range(count):
        watchdog.at(step, f"reading micro-batch {number}")
        yield read(micro_batches, step, rank)


def read(micro_batches: Iterator[MicroBatch], step: int, rank: int) -> MicroBatch:
    """The next micro-batch. Raises OSError that names the rank: only one may be without its shard."""
    try:
        return next(micro_batches)
    except Exception as error:  # a damaged shard may raise anything
        raise OSError(f"rank {rank} cannot read its rows of step {step}: {error!r}") from error


def resume(engine: DeepSpeedEngine, planned: Plan, recipe: Recipe, mesh: Mesh, console: Console) -> TrainState:
    """Load the last good checkpoint, on whatever mesh it was written -> the state to go on from. Collective."""
    start = TrainState(
        step=0,
        data=planned.data_hash,
        world_size=mesh.world_size,
        tensor=mesh.tensor_size,
        zero_stage=recipe.parallel.zero_stage,
    )
    loaded = load_last_good(engine, planned.run.checkpoints, mesh, planned.data_hash)
    if loaded is None:
        return start
    path, saved, damaged = loaded
    if mesh.rank == 0:
        for problem in damaged:
            planned.run.record_event("damaged checkpoint", saved.step, problem)
            console.print(f"[bold red]damaged:[/] {problem}; going back to {path.name}", soft_wrap=True)
        console.print(f"resumed from {path}", soft_wrap=True)
        for name in ("world_size", "tensor", "zero_stage"):
            if (then := getattr(saved, name)) != (now := getattr(start, name)):
                console.print(f"  {name} was {then} there and is {now} now: losses are equal to rounding")
    return replace(start, step=saved.step, skipped=saved.skipped, recent_losses=saved.recent_losses)


def use_deterministic_operations(deterministic: bool) -> None:
    """Choose, for this process, operations that give the same bits each time; or any."""
    if deterministic:
        # Read when cuBLAS and NCCL start, so before the first use of the GPU.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(deterministic)
    # Nothing reads memory that nothing has written; filling it first costs far more than the operations do.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def trained_targets(batches: Sequence[MicroBatch], context_parallel: int, mesh: Mesh) -> int:
    """How many targets of a step's global batch the loss counts. Collective."""
    count = torch.tensor(sum(int(batch.trained.sum()) for batch in batches if batch.trained is not None))
    count = count.to(mesh.device)
    dist.all_reduce(count, group=mesh.data_group)
    return int(count) // context_parallel  # each rank of a ring has counted the whole sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """One rank of a training run, as torchrun starts it."""
    parser = argparse.ArgumentParser(
        prog="python -m longring.launch.train",
        description="One rank of a training run; start it by torchrun, or use `longring train`.",
        epilog="example: torchrun --nproc-per-node 4 -m longring.launch.train launch/recipes/demo.toml train.steps=40",
    )
    parser.add_argument("recipe", help="TOML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    parser.add_argument("--stop-after", type=int, metavar="STEP", help="save and end after this step")
    options = parser.parse_intermixed_args(arguments)
    return as_rank(
        lambda: train(load_recipe(options.recipe, options.overrides), Console(), stop_after=options.stop_after)
    )


if __name__ == "__main__":
    sys.exit(main())
