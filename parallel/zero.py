"""The DeepSpeed engine: ZeRO, gradient accumulation and clipping, mixed precision."""

from __future__ import annotations

import io
import math
import os
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

# Set before the import: otherwise DeepSpeed warns on every rank that it found no accelerator but the CPU.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.utils import clip_grad_norm_
from deepspeed.utils import groups, set_z3_leaf_module

from .config import ParallelConfig, ZeroConfig
from .mesh import Mesh
from .overlap import OverlappedSums

# Otherwise DeepSpeed compiles C++ on a CPU at start-up, for collectives that only its inference uses.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


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


Dtype = Literal["float32", "bfloat16"]


def zero_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parallel: ParallelConfig,
    mesh: Mesh,
    *,
    accumulation_steps: int,
    clip_grad_norm: float,
    dtype: Dtype,
    gradient_dtype: Dtype = "float32",
) -> DeepSpeedEngine:
    """Wrap a model, whose weights are in `dtype`, and its AdamW optimizer in a DeepSpeed engine. Collective.

    The engine averages gradients over data ranks and accumulation steps, so the loss given to `engine.backward` must
    be this rank's sum times (data ranks x accumulation steps) / (trained tokens of the global batch). clip_grad_norm =
    0 switches clipping off. bfloat16 keeps fp32 master weights. Gradients are summed over micro-batches and over ranks
    in `gradient_dtype`. A step whose gradient norm is not finite changes neither weights nor moments on any rank.
    Learning rates are 0 until `set_learning_rate`.
    """
    mpu = _Mpu(mesh)
    if parallel.zero_stage == 0:
        _step_whole_weights(model, optimizer, mpu, clip_grad_norm or math.inf, dtype, gradient_dtype)
        clip_grad_norm = 0.0
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    config = deepspeed_config(parallel, dtype, gradient_dtype) | {
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": clip_grad_norm,
    }
    for module in model.modules():
        if getattr(module, "uses_weights_of_children", False):
            set_z3_leaf_module(module, True)  # ZeRO 3 gathers them around this module, not around its children
    with redirect_stdout(io.StringIO()):  # BF16_Optimizer prints the memory in use, five times over
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)
    if parallel.zero_stage == 0 and mesh.data_size == 1:
        engine.enable_backward_allreduce = False  # a sum over one rank, for which all gradients are copied twice
    if isinstance(engine.optimizer, BF16_Optimizer) and parallel.zero.overlap_comm:
        OverlappedSums(engine, mesh.data_group, parallel.zero.reduce_bucket_size)
    return engine


def deepspeed_config(parallel: ParallelConfig, dtype: Dtype, gradient_dtype: Dtype) -> dict[str, Any]:
    """Return the part of DeepSpeed's configuration that does not depend on the world or the batch."""
    sums = {"float32": "fp32", "bfloat16": "bf16"}[gradient_dtype]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 2**62,
        # Buckets are reduced while the backward computes the next; by default only ZeRO 3 does. There are two, and
        # DeepSpeed's 5e8 elements would take 2 GB and seldom fill before the end. (ZeRO 1 with fp32 sums of bf16
        # gradients reads neither; see `overlap.py`.)
        "zero_optimization": {"stage": parallel.zero_stage, **_zero_settings(parallel.zero)},
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW runs on the host as well, and needs no compiler
        # By default gradients travel in the model's dtype, whatever the dtype of their sum.
        "communication_data_type": sums,
    }
    if parallel.zero_stage and dtype == "bfloat16":
        # With fp32 sums ZeRO 1 takes BF16_Optimizer, which adds each gradient to its fp32 sum as soon as the backward
        # has it (immediate_grad_update), so that a bf16 copy of all gradients never exists.
        config |= {"bf16": {"enabled": True, "immediate_grad_update": True}, "data_types": {"grad_accum_dtype": sums}}
    return config


def _zero_settings(zero: ZeroConfig) -> dict[str, Any]:
    """Return DeepSpeed's settings of ZeRO, in which an offload is a table."""
    found = asdict(zero)
    for name in ("offload_optimizer", "offload_param"):
        found[name] = {"device": found[name]}
    return found


def partition_new(module: nn.Module, parallel: ParallelConfig, mesh: Mesh, dtype: Dtype) -> None:
    """Divide a module's parameters, equal on all data ranks, among these ranks under ZeRO 3. Collective.

    Called for one module of a new model after the other, it leaves no rank with more than its part and that module.
    """
    if parallel.zero_stage == 3:
        # The dtype of gradients has no part in the division of weights; the engine is given the recipe's.
        config = deepspeed_config(parallel, dtype, gradient_dtype="float32")
        deepspeed.zero.Init(
            module,
            data_parallel_group=mesh.data_group,
            config_dict_or_path=config,
            mpu=_Mpu(mesh),
            zero_param_parallel_group=groups._get_zero_param_intra_parallel_group(),  # made for the first module
        )


def _step_whole_weights(
    model: nn.Module, optimizer: torch.optim.Optimizer, mpu: _Mpu, max_norm: float, dtype: Dtype, gradient_dtype: Dtype
) -> None:
    """Make `optimizer` clip, record its gradient norm, and step fp32 weights that `model` holds rounded to `dtype`.

    ZeRO 0 is a plain optimizer to DeepSpeed, which only sums the gradients over ranks. Its own optimizer for bf16
    cannot sum in fp32, and its norm leaves out what the other tensor-parallel ranks hold.
    """
    weights: dict[nn.Parameter, nn.Parameter] = {}
    for param in model.parameters():
        weights[param] = param
        if dtype != "float32":
            weights[param] = nn.Parameter(param.detach().float())
            vars(weights[param]).update(vars(param))  # megatron-core's marks, by which the norm counts each weight once
            param.grad_dtype = getattr(torch, gradient_dtype)
            param.fp32_weight = weights[param]  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        group["params"] = [weights[param] for param in group["params"]]

    def clip_and_record(optimizer: Any, *_: object) -> None:
        for param, weight in weights.items():
            weight.grad = None if param.grad is None else param.grad.to(weight.dtype)
        norm = optimizer._global_grad_norm = clip_grad_norm_(weights.values(), max_norm, mpu=mpu)
        if not math.isfinite(norm):
            optimizer.zero_grad(set_to_none=True)  # AdamW skips parameters without a gradient

    @torch.no_grad()
    def round_weights(*_: object) -> None:
        for param, weight in weights.items():
            if weight is not param:
                param.copy_(weight)
                weight.grad = None  # DeepSpeed clears the gradients of the model alone

    optimizer.register_step_pre_hook(clip_and_record)
    optimizer.register_step_post_hook(round_weights)


def set_learning_rate(engine: DeepSpeedEngine, rate: float) -> None:
    """Set the learning rate of all parameters, used from the next step on."""
    for group in engine.optimizer.param_groups:  # type: ignore[union-attr]
        group["lr"] = rate


def gradient_norm(engine: DeepSpeedEngine) -> float:
    """Return the global gradient norm of the last step, before clipping; if it is not finite, no step was taken."""
    norm = engine.get_global_grad_norm()
    assert norm is not None, "every ZeRO stage records the norm of a step"
    return float(norm)
