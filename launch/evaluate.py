"""Held-out loss by bucket and by position in the context, on the mesh that trained the model.

longring evaluate RUN
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..data.files import write_text
from ..data.format.manifest import Manifest
from ..data.format.reader import SequenceReader
from ..data.read.knots import Knots
from ..data.read.loader import read_rows
from ..parallel.mesh import Mesh, join
from ..parallel.zero import DeepSpeedEngine
from .build import BucketLayout, bucket_layouts, build_engine
from .checkpoint.load import load_last_good
from .config import Recipe
from .grids.decide import decide_grids
from .preflight import plan
from .ranks.logs import open_log
from .ranks.rank import as_rank
from .run_directory import RunDirectory


def position_edges(min_tokens: int, max_tokens: int) -> list[int]:
    """Edges of the position ranges: 0, then powers of two from the smallest bucket to the largest."""
    edges = [0]
    while min_tokens <= max_tokens:
        edges.append(min_tokens)
        min_tokens *= 2
    return edges


def evaluate(recipe: Recipe, console: Console) -> dict[str, Any] | None:
    """Evaluate the last checkpoint of the recipe's run -> what evaluation.json holds, on rank 0. Collective.

    Losses are means over the tokens read, in nats. The unigram baseline knows the train split's token counts (plus
    one) and nothing of the context.
    """
    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    planned = plan(recipe, world_size, check_shards=rank == 0)
    manifest, run = planned.manifest, planned.run
    if planned.resume_from is None:
        raise ValueError(f"{run.path} has no checkpoint yet: train first")
    open_log(run.log_file(rank))
    mesh = join(recipe.parallel, recipe.max_context_parallel)
    engine = build_engine(recipe, manifest.vocab_size, mesh)
    loaded = load_last_good(engine, run.checkpoints, mesh, planned.data_hash)
    assert loaded is not None, "there was one to plan with"
    engine.eval()

    counts = torch.from_numpy(manifest.unigram()).double() + 1
    unigram_losses = (counts.sum().log() - counts.log()).to(mesh.device)
    tied = recipe.evaluate.knots and recipe.knots.share
    knots = Knots(recipe.knots, manifest.tokenizer(), recipe.train.seed) if tied else None
    edges = position_edges(recipe.data.min_bucket_tokens, recipe.data.max_bucket_tokens)
    limit = recipe.evaluate.max_tokens_per_bucket
    held_out = [bucket for bucket in manifest.buckets("held_out") if min(bucket.sequences, limit // bucket.length)]
    lengths = [bucket.length for bucket in held_out]
    layouts = bucket_layouts(recipe, mesh, lengths, decide_grids(recipe, mesh, lengths))
    buckets = []
    for bucket in held_out:
        num_sequences = min(bucket.sequences, limit // bucket.length)
        layout = layouts[bucket.length]
        sums = _sums_by_position(
            engine, manifest, manifest.reader(bucket), knots, num_sequences, layout, mesh, edges, unigram_losses
        )
        loss, unigram, tokens = sums.sum(1).tolist()
        assert knots is not None or tokens == num_sequences * bucket.length, "every token counts once"
        parts = zip(edges, edges[1:], sums[0].tolist(), sums[2].tolist(), strict=False)
        buckets.append(
            {
                "bucket": bucket.length,
                "cp": layout.context_parallel,
                "sequences": num_sequences,
                "tokens": int(tokens),
                "loss": loss / tokens,
                "unigram_loss": unigram / tokens,
                "by_position": [
                    {"from": start, "to": stop, "loss": total / count, "tokens": int(count)}
                    for start, stop, total, count in parts
                    if count
                ],
            }
        )
    if not buckets:
        raise ValueError(
            f"{recipe.training_directory} holds no held-out sequence within evaluate.max_tokens_per_bucket = "
            f"{recipe.evaluate.max_tokens_per_bucket}: raise it, or prepare with a larger data.held_out_fraction"
        )
    total = sum(entry["tokens"] for entry in buckets)
    result = {
        "step": loaded[1].step,
        "tokens": total,
        "loss": sum(entry["loss"] * entry["tokens"] for entry in buckets) / total,
        "unigram_loss": sum(entry["unigram_loss"] * entry["tokens"] for entry in buckets) / total,
        "buckets": buckets,
    }
    if rank != 0:
        return None
    write_text(run.evaluation_file, json.dumps(result, indent=2) + "\n")
    console.print(evaluation_table(result))
    return result


def _sums_by_position(
    engine: DeepSpeedEngine,
    manifest: Manifest,
    reader: SequenceReader,
    knots: Knots | None,
    num_sequences: int,
    layout: BucketLayout,
    mesh: Mesh,
    edges: list[int],
    unigram_losses: Tensor,
) -> Tensor:
    """Sums over the bucket's first sequences, by position range: loss, unigram loss, tokens; fp64 `[3, ranges]`."""
    at_once = layout.num_replicas * layout.sequences_per_replica
    positions = layout.sequence.positions(mesh.device)
    ranges = torch.bucketize(positions, torch.tensor(edges[1:], device=mesh.device), right=True)
    sums = torch.zeros(3, len(edges) - 1, dtype=torch.float64, device=mesh.device)
    for first in range(0, num_sequences, at_once):
        mine = first + layout.replica * layout.sequences_per_replica + np.arange(layout.sequences_per_replica)
        # The last micro-batch is filled up with sequence 0, which then does not count.
        indices = np.where(mine < num_sequences, mine, 0)
        rows, document_starts, trained = read_rows(reader, indices, manifest.needs_starts, knots)
        counted = torch.from_numpy(mine < num_sequences).to(mesh.device).double()[:, None]
        inputs = layout.model_inputs(rows, document_starts, mesh.device)
        with torch.no_grad():
            losses = engine(*inputs)
        counted = counted * layout.trained(trained, losses).double().view(len(mine), -1)
        losses = losses.double().view(len(mine), -1)
        targets = inputs[1].view(len(mine), -1)
        values = torch.stack([losses, unigram_losses[targets], torch.ones_like(losses)]) * counted
        sums.index_add_(1, ranges, values.sum(1))
    dist.all_reduce(sums, group=mesh.data_group)
    return sums


def evaluation_table(result: dict[str, Any]) -> Table:
    """Held-out loss: a row for each bucket, a column for each range of positions."""
    longest = max(result["buckets"], key=lambda entry: entry["bucket"])
    ranges = [(part["from"], part["to"]) for part in longest["by_position"]]
    table = Table(
        title=f"Held-out loss at step {result['step']}, nats per token; right: by position in context",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("bucket", "cp", "tokens", "unigram", "loss"):
        table.add_column(name, justify="right", no_wrap=True)
    for _, stop in ranges:
        table.add_column(f"< {stop}", justify="right", no_wrap=True)
    for entry in result["buckets"]:
        parts = {(part["from"], part["to"]): f"{part['loss']:.3f}" for part in entry["by_position"]}
        table.add_row(
            f"{entry['bucket']:,}",
            str(entry["cp"]),
            f"{entry['tokens']:,}",
            f"{entry['unigram_loss']:.3f}",
            f"{entry['loss']:.3f}",
            *(parts.get(span, "") for span in ranges),
        )
    table.add_section()
    table.add_row("all", "", f"{result['tokens']:,}", f"{result['unigram_loss']:.3f}", f"{result['loss']:.3f}")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """One rank of an evaluation, as torchrun starts it."""
    parser = argparse.ArgumentParser(
        prog="python -m longring.launch.evaluate",
        description="One rank of an evaluation; start it by torchrun, or use `longring evaluate`.",
        epilog="example: torchrun --nproc-per-node 4 -m longring.launch.evaluate runs/demo",
    )
    parser.add_argument("run", help="run directory")
    parser.add_argument("overrides", nargs="*", metavar="evaluate.key=value", help="settings that replace the run's")
    options = parser.parse_args(arguments)

    def work() -> None:
        evaluate(RunDirectory(options.run).recipe(options.overrides), Console())

    return as_rank(work)


if __name__ == "__main__":
    sys.exit(main())
