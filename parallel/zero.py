"""The DeepSpeed engine: ZeRO, gradient accumulation and clipping, mixed precision."""

from __future__ import annotations

import math
import os
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

# Set before the import: otherwise DeepSpeed warns on every rank that it found no accelerator but the CPU.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.utils import clip_grad_norm_

from .config import ParallelConfig
from .mesh import Mesh


class _Mpu:
    """DeepSpeed's "model parallelism unit". Its data-parallel ranks include those of a context-parallel group."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def get_model_parallel_rank(self) -> int:
        return self.mesh.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.tensor_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.tensor_group

    def get_data_parallel_rank(self) -> int:
        return self.mesh.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.data_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.data_group


def zero_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parallel: ParallelConfig,
    mesh: Mesh,
    *,
    accumulation_steps: int,
    clip_grad_norm: float,
    dtype: Literal["float32", "bfloat16"],
) -> DeepSpeedEngine:
    """Wrap a model and its AdamW optimizer in a DeepSpeed engine. Collective.

    The engine averages gradients over data ranks and accumulation steps, so the loss given to `engine.backward` must
    be this rank's sum times (data ranks x accumulation steps) / (trained tokens of the global batch). clip_grad_norm =
    0 switches clipping off. bfloat16 keeps fp32 master weights. A step whose gradient norm is not finite changes
    neither weights nor moments on any rank. Learning rates are 0 until `set_learning_rate`.
    """
    # Otherwise DeepSpeed compiles C++ on a CPU at start-up, for collectives that only its inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    mpu = _Mpu(mesh)
    if parallel.zero_stage == 0 and dtype == "float32":
        # In this case alone DeepSpeed steps the plain optimizer: it neither clips nor records a gradient norm.
        max_norm = clip_grad_norm or math.inf

        def clip_and_record(optimizer: Any, *_: object) -> None:
            norm = optimizer._global_grad_norm = clip_grad_norm_(model.parameters(), max_norm, mpu=mpu)
            if not math.isfinite(norm):
                optimizer.zero_grad(set_to_none=True)  # AdamW skips parameters without a gradient

        optimizer.register_step_pre_hook(clip_and_record)
        clip_grad_norm = 0.0
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": clip_grad_norm,
        "zero_optimization": {"stage": parallel.zero_stage},
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": 2**62,
    }
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)
    # With ZeRO 0 in bf16 DeepSpeed takes one step without gradients to allocate the moments. Rate 0 keeps the weights;
    # AdamW's step count, which corrects the moments' bias, must return to 0.
    for state in optimizer.state.values():
        state["step"].zero_()
    return engine


def set_learning_rate(engine: DeepSpeedEngine, rate: float) -> None:
    """Set the learning rate of all parameters, used from the next step on."""
    for group in engine.optimizer.param_groups:  # type: ignore[union-attr]
        group["lr"] = rate


def gradient_norm(engine: DeepSpeedEngine) -> float:
    """Return the global gradient norm of the last step, before clipping; if it is not finite, no step was taken."""
    norm = engine.get_global_grad_norm()
    assert norm is not None, "every ZeRO stage records the norm of a step"
    return float(norm)
