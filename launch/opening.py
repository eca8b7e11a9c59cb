"""The lines with which a start tells what it is about to train."""

from __future__ import annotations

import math

from ..data.read.batch_order import BatchOrder
from ..parallel.fragments import parameters
from ..parallel.mesh import Mesh
from ..parallel.zero import DeepSpeedEngine
from .config import Recipe


def opening(recipe: Recipe, order: BatchOrder, engine: DeepSpeedEngine, mesh: Mesh) -> list[str]:
    """Return the lines about ranks, parameters, a step and the passes over each bucket."""
    parallel, train = recipe.parallel, recipe.train
    tensor = f" x {mesh.tensor_size} tensor-parallel" if mesh.tensor_size > 1 else ""
    count = sum(math.prod(parameter.shape) for parameter in parameters(engine, mesh.tensor_size))
    accumulations = recipe.accumulation_steps(mesh.world_size)
    passes = ", ".join(f"{bucket.length:,}: {bucket.passes:.3g}" for bucket in order.trained(train.steps))
    return [
        f"ranks: {mesh.world_size} ({mesh.data_size} data-parallel{tensor}), rings of up to "
        f"{recipe.max_context_parallel}, ZeRO {parallel.zero_stage}",
        f"parameters: {count:,} in {train.dtype}, gradients summed in {train.gradient_dtype}; activations: "
        f"{train.memory.activations}",
        f"a step: {train.global_batch_tokens:,} tokens, as {accumulations:,} micro-batches of "
        f"{parallel.tokens_per_rank:,} tokens on each data-parallel rank",
        f"passes over each bucket in {train.steps:,} steps: {passes}",
    ]
