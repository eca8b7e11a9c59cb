"""`longring evaluate`: held-out loss by bucket and by position in the context, on the mesh that trained the model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._C._distributed_c10d import Store

from ..data.files import write_text
from ..data.format.bucket import Bucket
from ..data.format.manifest import Manifest
from ..data.read.knots import Knots
from ..data.read.loader import read_rows
from ..data.tasks.catalog import chosen_tasks
from ..parallel.meet import meet
from ..parallel.mesh import Mesh, join
from ..parallel.world import World
from ..parallel.zero import DeepSpeedEngine
from .build import BucketLayout, build_engine, open_layouts
from .config import FaultsConfig, Recipe
from .evaluation.long_context import long_context
from .evaluation.score import Scorer
from .evaluation.show import long_context_tables
from .ranks.logs import open_log
from .ranks.rank import as_rank
from .ranks.watchdog import Watchdog
from .records import append_record
from .run_directory import RunDirectory
from .tables import plain_table
from .target import Target, target_of_run, target_of_weights


def position_edges(min_tokens: int, max_tokens: int) -> list[int]:
    """Return the edges of the position ranges: 0, then powers of two from the smallest bucket to the largest."""
    edges = [0]
    while min_tokens <= max_tokens:
        edges.append(min_tokens)
        min_tokens *= 2
    return edges


@dataclass
class Evaluator:
    """Measurement of held-out losses, one rank's part; all ranks call its methods in the same order."""

    engine: DeepSpeedEngine
    manifest: Manifest
    mesh: Mesh
    knots: Knots | None
    """Knots to tie into the sequences; None: they are read as stored."""
    edges: list[int]
    """Edges of the position ranges: range r holds positions edges[r] <= p < edges[r + 1]."""
    unigram_losses: Tensor
    """`[vocab_size]`, fp64: the loss of each token under the train split's token counts plus one."""
    at: Callable[[str], None]
    """Records that an operation begins."""

    def sums_by_position(self, bucket: Bucket, num_sequences: int, layout: BucketLayout) -> Tensor:
        """Return sums over the first `num_sequences` of a bucket by range of positions. Collective.

        The result is loss, unigram loss and number of tokens, fp64 `[3, ranges]`.
        """
        mesh, reader = self.mesh, self.manifest.reader(bucket)
        # Sequences of one micro-batch of all replicas; replica r takes the r-th part of each.
        at_once = layout.num_replicas * layout.sequences_per_replica
        edges = torch.tensor(self.edges[1:], device=mesh.device)
        sums = torch.zeros(3, len(self.edges) - 1, dtype=torch.float64, device=mesh.device)
        for first in range(0, num_sequences, at_once):
            self.at(f"evaluating sequence {first} of bucket {bucket.length} and those after it")
            mine = first + layout.replica * layout.sequences_per_replica + np.arange(layout.sequences_per_replica)
            # The last micro-batch is filled up with sequence 0, which then does not count.
            indices = np.where(mine < num_sequences, mine, 0)
            rows, document_starts, trained = read_rows(reader, indices, self.manifest.needs_starts, self.knots)
            inputs = layout.model_inputs(rows, document_starts, mesh.device)
            with torch.no_grad():
                losses = self.engine(*inputs)
            # Packed rows come back as one sequence of b = 1: [1, b s] -> [b, s].
            real = torch.from_numpy(mine < num_sequences).to(mesh.device).double()[:, None]
            counted = real * layout.trained(trained, losses, inputs[2]).double().view(len(mine), -1)
            losses, targets = losses.double().view(len(mine), -1), inputs[1].view(len(mine), -1)
            # [3, b, s]
            values = torch.stack([losses, self.unigram_losses[targets], torch.ones_like(losses)]) * counted
            # [s]: the range of each position; with right=True a position on an edge is in the range that begins there.
            ranges = torch.bucketize(layout.positions(inputs[2], mesh.device), edges, right=True)
            sums.index_add_(1, ranges, values.sum(1))
        self.at(f"summing bucket {bucket.length} over the ranks")
        # The ranks of a tensor-parallel group have equal sums, so they are not added.
        dist.all_reduce(sums, group=mesh.data_group)
        return sums

    def evaluate_bucket(self, bucket: Bucket, num_sequences: int, layout: BucketLayout) -> dict[str, Any]:
        """Return a bucket's entry of evaluation.json. Collective."""
        sums = self.sums_by_position(bucket, num_sequences, layout)
        loss, unigram, tokens = sums.sum(1).tolist()
        assert self.knots is not None or tokens == num_sequences * bucket.length, "every token counts once"
        parts = zip(self.edges, self.edges[1:], sums[0].tolist(), sums[2].tolist(), strict=False)
        return {
            "bucket": bucket.length,
            "cp": layout.context_parallel,
            "sequences": num_sequences,
            "tokens": int(tokens),
            "loss": loss / tokens,
            "unigram_loss": unigram / tokens,
            "by_position": [
                {"from": first, "to": stop, "loss": total / count, "tokens": int(count)}
                for first, stop, total, count in parts
                if count
            ],
        }


def evaluate(recipe: Recipe, console: Console) -> dict[str, Any] | None:
    """Evaluate the last checkpoint of the recipe's run; return the content of evaluation.json on rank 0, else None.

    Losses are means over the tokens read, in nats. The unigram baseline knows the train split's token counts and
    nothing of the context. Raises ValueError if there is no checkpoint, or no held-out sequence that is short enough,
    and ConnectionError if another rank is gone. Collective.
    """
    world = World.from_environment()
    store = meet(world, timedelta(minutes=recipe.faults.collective_minutes))
    target = target_of_run(recipe, store, world)
    result = _evaluate(target, world, store, console)
    if result is not None:
        write_text(target.run.evaluation_file, json.dumps(result, indent=2) + "\n")
        append_record(target.run.evaluations_file, result)
    return result


def evaluate_weights(
    path: Path, data: str, overrides: Sequence[str], logs: Path, console: Console
) -> dict[str, Any] | None:
    """Evaluate weights on other data, as `target_of_weights` says; return the result on rank 0, else None. Collective.

    Raises ValueError and ConnectionError as `evaluate` does.
    """
    world = World.from_environment()
    store = meet(world, timedelta(minutes=FaultsConfig().collective_minutes))
    target = target_of_weights(path, data, overrides, RunDirectory(logs), store, world)
    return _evaluate(target, world, store, console)


def _evaluate(target: Target, world: World, store: Store, console: Console) -> dict[str, Any] | None:
    """Evaluate a target and print its tables; return the result on rank 0, else None. Collective."""
    recipe, faults = target.recipe, target.recipe.faults
    limit = recipe.evaluate.max_tokens_per_bucket
    buckets = [bucket for bucket in target.manifest.buckets("held_out") if bucket.length in recipe.lengths]
    numbers = [(bucket, min(bucket.sequences, limit // bucket.length)) for bucket in buckets]
    held_out = [(bucket, number) for bucket, number in numbers if number]
    if not held_out:
        raise ValueError(
            f"evaluate.max_tokens_per_bucket = {limit}: no held-out sequence of {recipe.training_directory} is that "
            "short; raise it, or prepare other data with a larger data.held_out_fraction"
        )
    open_log(target.run.log_file(world.rank))
    mesh = join(recipe.parallel, recipe.max_context_parallel, faults.collective_minutes, store)
    with Watchdog(target.run, world.rank, world.size, 60 * faults.hang_minutes) as watchdog:
        step, entries, long_context = evaluate_buckets(target, mesh, watchdog, held_out)
    if world.rank != 0:
        return None
    result = {**with_means(target.name, step, entries), **long_context}
    for table in [*evaluation_tables(result), *long_context_tables(long_context)]:
        console.print(table)
    return result


def evaluate_buckets(
    target: Target, mesh: Mesh, watchdog: Watchdog, held_out: Sequence[tuple[Bucket, int]]
) -> tuple[int, list[dict[str, Any]], dict[str, Any]]:
    """Return the step of the weights, the entry of each bucket over a number of its sequences, and `long_context`.

    Collective.
    """
    recipe, manifest = target.recipe, target.manifest
    chosen_tasks(recipe.evaluate.tasks)  # a wrong name is told before the model is built
    watchdog.at(0, "building the model and loading the weights")
    engine = build_engine(recipe, manifest.vocab_size, mesh)
    step = target.load(engine, mesh)
    engine.eval()
    # One more of each token: a token that the train split lacks then has a finite loss.
    counts = torch.from_numpy(manifest.unigram()).double() + 1
    tied = recipe.evaluate.knots and recipe.knots.share
    evaluator = Evaluator(
        engine,
        manifest,
        mesh,
        knots=Knots(recipe.knots, manifest.tokenizer(), recipe.train.seed) if tied else None,
        edges=position_edges(min(recipe.lengths), max(recipe.lengths)),
        unigram_losses=(counts.sum().log() - counts.log()).to(mesh.device),
        at=partial(watchdog.at, step),
    )
    layouts = open_layouts(recipe, mesh, [bucket.length for bucket, _ in held_out], evaluator.at)
    entries = [evaluator.evaluate_bucket(bucket, number, layouts[bucket.length]) for bucket, number in held_out]
    scorers = [Scorer(engine, mesh, layouts[bucket.length], evaluator.at) for bucket, _ in held_out]
    return step, entries, long_context(recipe.evaluate, manifest, scorers)


def with_means(target: str, step: int, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the content of evaluation.json: the entries of the buckets, and the means over all their tokens."""
    tokens = sum(entry["tokens"] for entry in entries)
    loss, unigram = (sum(e[name] * e["tokens"] for e in entries) / tokens for name in ("loss", "unigram_loss"))
    return {"target": target, "step": step, "tokens": tokens, "loss": loss, "unigram_loss": unigram, "buckets": entries}


def evaluation_tables(result: dict[str, Any]) -> list[Table]:
    """Return the held-out loss as two tables: by bucket, and by bucket and range of positions."""
    title = f"Held-out loss of {result['target']} at step {result['step']}, nats per token"
    by_bucket = plain_table(title, "bucket", "cp", "tokens", "unigram", "loss")
    for entry in result["buckets"]:
        losses = f"{entry['unigram_loss']:.3f}", f"{entry['loss']:.3f}"
        by_bucket.add_row(f"{entry['bucket']:,}", str(entry["cp"]), f"{entry['tokens']:,}", *losses)
    by_bucket.add_section()
    by_bucket.add_row("all", "", f"{result['tokens']:,}", f"{result['unigram_loss']:.3f}", f"{result['loss']:.3f}")

    longest = max(result["buckets"], key=lambda entry: entry["bucket"])
    ranges = [(part["from"], part["to"]) for part in longest["by_position"]]
    buckets = [f"{entry['bucket']:,}" for entry in result["buckets"]]
    by_position = plain_table("The same by position in the context", "position", *buckets)
    parts = [{(p["from"], p["to"]): f"{p['loss']:.3f}" for p in entry["by_position"]} for entry in result["buckets"]]
    for span in ranges:
        by_position.add_row(_below(span[1]), *(found.get(span, "") for found in parts))
    return [by_bucket, by_position]


def _below(position: int) -> str:
    """Return a position as "<512", "<4k" or "<1M"."""
    for power, unit in ((20, "M"), (10, "k")):
        if position >= 1 << power and position % (1 << power) == 0:
            return f"<{position >> power}{unit}"
    return f"<{position}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rank of an evaluation, as torchrun starts it; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m longring.launch.evaluate",
        description="One rank of an evaluation; start it by torchrun, or use `longring evaluate`.",
        epilog="example: torchrun --nproc-per-node 4 -m longring.launch.evaluate runs/demo",
    )
    parser.add_argument("target", help="run directory, or with --data any weights")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the run's")
    parser.add_argument("--data", default="", help="prepared data or a recipe, instead of the run's own data")
    parser.add_argument(
        "--reports", type=Path, default=Path("evaluation-reports"), metavar="DIR", help="logs, with --data"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the losses to FILE")
    options = parser.parse_intermixed_args(arguments)

    def work() -> None:
        if options.data:
            result = evaluate_weights(Path(options.target), options.data, options.overrides, options.reports, Console())
        else:
            result = evaluate(RunDirectory(options.target).recipe(options.overrides), Console())
        if result is not None and options.json:
            write_text(options.json, json.dumps(result, indent=2) + "\n")

    return as_rank(work)


if __name__ == "__main__":
    sys.exit(main())
