"""The lines that a start prints about the training to come."""

from __future__ import annotations

import math
from itertools import chain

from ..data.read.batch_order import BatchOrder
from ..parallel.fragments import parameters
from ..parallel.mesh import Mesh
from ..parallel.zero import DeepSpeedEngine
from .config import Recipe
from .fit.memory import GIB, moments, peak


def opening(recipe: Recipe, order: BatchOrder, engine: DeepSpeedEngine, mesh: Mesh, vocab_size: int) -> list[str]:
    """Return the lines about ranks, parameters, a step, the passes over each bucket and the predicted memory.

    `vocab_size` is the tokenizer's.
    """
    parallel, train = recipe.parallel, recipe.train
    tensor = f" x {mesh.tensor_size} tensor-parallel" if mesh.tensor_size > 1 else ""
    count = sum(math.prod(parameter.shape) for parameter in parameters(engine, mesh.tensor_size))
    accumulations = recipe.accumulation_steps(mesh.world_size)
    passes = ", ".join(f"{bucket.length:,}: {bucket.passes:.3g}" for bucket in order.trained(train.steps))
    on_gpu = mesh.device.type == "cuda"
    every = (moments(recipe, mesh.world_size, length, vocab_size, on_gpu=on_gpu) for length in recipe.lengths)
    memory = peak(chain(*every))
    largest = sorted(memory.by_kind().items(), key=lambda kind: -kind[1])[:3]
    kinds = ", ".join(f"{name} {count / GIB:.3g}" for name, count in largest)
    return [
        f"ranks: {mesh.world_size} ({mesh.data_size} data-parallel{tensor}), rings of up to "
        f"{recipe.max_context_parallel}, ZeRO {parallel.zero_stage}",
        f"parameters: {count:,} in {train.dtype}, gradients summed in {train.gradient_dtype}; activations: "
        f"{train.memory.activations}",
        f"a step: {train.global_batch_tokens:,} tokens, as {accumulations:,} "
        f"micro-batch{'es' * (accumulations > 1)} of {parallel.tokens_per_rank:,} tokens on each data-parallel rank",
        f"passes over each bucket in {train.steps:,} steps: {passes}",
        f"memory of a rank: {memory.total / GIB:.3g} GiB predicted, at the peak in the {memory.moment} ({kinds}); what "
        f"attention holds of other ranks comes on top; on the host {memory.host / GIB:.3g} GiB",
    ]
