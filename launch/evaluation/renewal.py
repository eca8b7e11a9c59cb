"""Held-out losses of the sources during training, from which the shares of the next cycle follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from ...data.format.manifest import Manifest
from ...data.read.mix import buckets_in_use
from ...data.read.renewal import Renewal, held_out_sequences
from ...data.read.shares import Cells
from ...parallel.mesh import Mesh
from ...parallel.zero import DeepSpeedEngine
from ..build import BucketLayout
from ..config import Recipe
from ..together import from_rank_0
from .held_out import HeldOutLoss, by_source


def measure_renewal(
    recipe: Recipe,
    manifest: Manifest,
    mesh: Mesh,
    engine: DeepSpeedEngine,
    layouts: Mapping[int, BucketLayout],
    at: Callable[[str], None],
    step: int,
) -> Renewal:
    """Return the mean loss of each source over its held-out sequences, after `step` steps; equal on all ranks.

    The engine is in evaluation mode meanwhile, and in training mode afterwards. Raises ArithmeticError if a loss
    is not finite. Collective.
    """
    cells = Cells.of(buckets_in_use(manifest, recipe.curriculum))
    totals = torch.zeros(len(cells.sources), 2, dtype=torch.float64)  # loss and tokens
    held_out = HeldOutLoss(engine, recipe, manifest, mesh, at)
    engine.eval()
    try:
        for bucket, numbers in held_out_sequences(manifest, cells, recipe.curriculum.renewal):
            # The parts of every bucket are all sources, in the order of `cells.sources`: [sources] each.
            loss, _, tokens = held_out.sums(bucket, numbers, layouts[bucket.length], [by_source(bucket)])
            totals += torch.stack([loss, tokens], 1)
    finally:
        engine.train()
    found = zip(cells.sources, totals.tolist(), strict=True)
    # Rank 0 decides: the bits of a sum may differ between process groups.
    losses = from_rank_0({source: loss / tokens for source, (loss, tokens) in found if tokens})
    if not all(map(math.isfinite, losses.values())):
        told = ", ".join(f"{source} {loss:.4g}" for source, loss in losses.items())
        raise ArithmeticError(
            f"step {step}: not all held-out losses are finite ({told}), so the weights may be corrupt; give the same "
            "command again to continue from the last checkpoint"
        )
    return Renewal(step, losses)
