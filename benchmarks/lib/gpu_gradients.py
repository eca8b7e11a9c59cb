"""Section of the gradients: steps that sum them over ranks during the last backward, and after it.

The generator runs on all ranks of a world; rank 0 alone yields rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median

import torch
import torch.distributed as dist
from longring.kernels.layout import SeqLayout
from longring.launch.build import attention_on_one_rank, build_engine
from longring.launch.config import load_recipe
from longring.parallel.mesh import Mesh
from longring.parallel.zero import DeepSpeedEngine

from .gpu_ranks import joined, largest, say
from .gpu_training import RECIPE
from .script import Row, Size

ROUNDS = 5
"""Timed steps of each kind, in turns, after one that allocates and compiles."""
MICRO_BATCHES = 2


def gradient_rows(size: Size) -> Iterator[Row]:
    """Yield the median ms of a step of two micro-batches under ZeRO 1 and 2, by the time of the sums. Collective."""
    hidden, layers, tokens = {"full": (2048, 16, 8192), "quick": (256, 2, 256), "smallest": (64, 2, 64)}[size]
    with joined() as mesh:
        for stage in (1, 2):
            engines = {when: engine_of(stage, when, (hidden, layers, tokens), mesh) for when in ("during", "after")}
            seconds: dict[str, list[float]] = {when: [] for when in engines}
            for _ in range(1 + ROUNDS):
                for when, engine in engines.items():
                    say(mesh, f"ZeRO {stage}, sums {when} the backward")
                    seconds[when].append(step_s(engine, tokens, mesh))
            during, after = largest([1e3 * median(of[1:]) for of in seconds.values()], mesh)
            if mesh.rank == 0:
                parameters = sum(p.numel() for p in engines["during"].module.parameters())  # type: ignore[union-attr]
                yield {
                    **{"zero_stage": stage, "ranks": mesh.data_size, "parameters": parameters, "tokens_a_rank": tokens},
                    **{"during_ms": during, "after_ms": after, "ratio": during / after},
                }


def engine_of(stage: int, when: str, sizes: tuple[int, int, int], mesh: Mesh) -> DeepSpeedEngine:
    """Return the engine of a model in bf16 that sums gradients `when`: "during" the last backward, or "after" it."""
    hidden, layers, tokens = sizes
    recipe = load_recipe(
        RECIPE,
        [
            *(f"model.hidden_size={hidden}", f"model.ffn_hidden_size={3 * hidden}", f"model.num_layers={layers}"),
            *("model.num_heads=8", "model.num_kv_heads=4", "train.dtype=bfloat16", f"parallel.zero_stage={stage}"),
            *(f"data.max_bucket_tokens={tokens}", "data.min_bucket_tokens=64", f"parallel.tokens_per_rank={tokens}"),
            f"train.global_batch_tokens={MICRO_BATCHES * tokens * mesh.data_size}",
            f"parallel.zero.overlap_comm={'true' if when == 'during' else 'false'}",
        ],
    )
    return build_engine(recipe, 8192, mesh)


def step_s(engine: DeepSpeedEngine, num_tokens: int, mesh: Mesh) -> float:
    """Return the seconds of one step. Collective."""
    layout = SeqLayout.contiguous(num_tokens)
    attend = attention_on_one_rank("auto", mesh.device, [None])(layout)
    tokens = torch.randint(8192, (1, num_tokens + 1), device=mesh.device)
    dist.barrier()
    started = time.perf_counter()
    for _ in range(MICRO_BATCHES):
        losses = engine(tokens[:, :-1], tokens[:, 1:], layout, attend)
        engine.backward(losses.mean())
        engine.step()
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
