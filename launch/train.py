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
from collections.abc import Sequence
from itertools import islice

import torch
import torch.distributed as dist
from rich.console import Console

from ..data.batch_order import Share
from ..data.loader import Loader, MicroBatch
from ..data.order.knots import Knots
from ..parallel.mesh import Mesh, join
from ..parallel.zero import gradient_norm, set_learning_rate
from . import checkpoint
from .build import build_engine, places
from .config import Recipe, TrainConfig, load_recipe
from .logs import open_log
from .metrics import MetricsWriter, StepMetrics, trained_table
from .plan import plan
from .ranks import as_rank

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


def train(recipe: Recipe, console: Console, stop_after: int | None = None) -> None:
    """Train until recipe.train.steps, or until `stop_after` steps are done and saved. Collective."""
    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    planned = plan(recipe, world_size, check_shards=rank == 0)
    run, order, done = planned.run, planned.order, planned.done
    last = min(recipe.train.steps, stop_after or recipe.train.steps)
    if done >= last:
        if rank == 0:
            console.print(f"{run.path} has its {done} steps already; nothing to train")
        return

    open_log(run.log_file(rank))
    mesh = join(recipe.parallel, recipe.max_context_parallel)
    if rank == 0:
        run.create(recipe)
        run.record_start(world_size, from_step=done)
    engine = build_engine(recipe, planned.manifest.vocab_size, mesh)
    if planned.resume_from is not None:
        checkpoint.load(engine, planned.resume_from)
        if rank == 0:
            console.print(f"resumed from {planned.resume_from}")

    writer = MetricsWriter(run, done, recipe.train.steps, console) if rank == 0 else None
    here_of = places(recipe, mesh, order.lengths, console if rank == 0 else None)
    shares = {
        length: Share(here.replica, here.num_replicas, here.sequences_per_replica) for length, here in here_of.items()
    }
    pin_memory = mesh.device.type == "cuda"
    knots = Knots(recipe.knots, planned.manifest.tokenizer(), recipe.train.seed) if recipe.knots.share else None
    loader = Loader(planned.manifest, order, recipe.loader, shares.__getitem__, pin_memory=pin_memory, knots=knots)
    micro_batches = loader.batches(done, last)
    accumulation_steps = recipe.accumulation_steps(world_size)
    try:
        for step in range(done + 1, last + 1):
            started = time.perf_counter()
            rate = learning_rate(step, recipe.train)
            set_learning_rate(engine, rate)
            length = order.lengths[order.bucket(step - 1)]
            here = here_of[length]
            batches, targets = islice(micro_batches, accumulation_steps), recipe.train.global_batch_tokens
            if knots is not None:
                batches = list(batches)
                targets = trained_targets(batches, here.context_parallel, mesh)
            # The engine averages gradients over data ranks and accumulation steps; the loss of a step is the mean over
            # the trained targets of the global batch, wherever they lie.
            loss_scale = mesh.data_size * accumulation_steps / targets
            loss_sum = torch.zeros((), dtype=torch.float64, device=mesh.device)
            for micro_batch in batches:
                losses = engine(*here.model_inputs(micro_batch.rows, micro_batch.document_starts, mesh.device))
                losses = losses * here.trained(micro_batch.trained, losses)
                engine.backward(losses.sum() * loss_scale)
                engine.step()
                loss_sum += losses.detach().sum(dtype=torch.float64)
            dist.all_reduce(loss_sum, group=mesh.data_group)
            loss = loss_sum.item() / targets
            grad_norm = gradient_norm(engine)
            if not math.isfinite(loss) or not math.isfinite(grad_norm):
                raise ArithmeticError(
                    f"step {step}: loss {loss}, gradient norm {grad_norm}, bucket {length}; the last good state is "
                    f"{checkpoint.latest(run.checkpoints)}"
                )
            seconds = time.perf_counter() - started
            if writer is not None:
                writer.write(
                    StepMetrics(
                        step=step,
                        tokens=step * recipe.train.global_batch_tokens,
                        targets=targets,
                        loss=loss,
                        bucket=length,
                        cp=here.context_parallel,
                        learning_rate=rate,
                        grad_norm=grad_norm,
                        step_ms=seconds * 1e3,
                        tokens_per_s=recipe.train.global_batch_tokens / seconds,
                    )
                )
            if step == last or step % recipe.train.checkpoint_every_steps == 0:
                state = checkpoint.TrainState(step=step, world_size=world_size, data=planned.data_hash)
                log.info("saved %s", checkpoint.save(engine, run.checkpoints, state, mesh))
    finally:
        micro_batches.close()
        if writer is not None:
            writer.close()
    if rank == 0:
        console.print(f"saved {checkpoint.latest(run.checkpoints)}", soft_wrap=True)
        if last == recipe.train.steps:
            console.print(trained_table(order.trained(last)))


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
