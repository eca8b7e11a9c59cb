"""Fragments: this rank's part of every parameter's fp32 weight and AdamW moments, at any ZeRO stage.

DeepSpeed keeps them in flat buffers whose layout depends on stage and world size. A `Fragment` is a set of views of
those buffers, with the parameter's name and the range of the flattened tensor-parallel slice that they cover. A
checkpoint copies out of the views; a resume copies into them and calls `refresh`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .mesh import Mesh
from .parameters import KINDS, Cut, Fragment, Parameter
from .zero import DeepSpeedEngine  # before the imports below: it tells DeepSpeed its device

# isort: split
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer


def held(engine: DeepSpeedEngine, mesh: Mesh) -> list[Fragment]:
    """Return the fragments that this rank's optimizer steps. With ZeRO 0 every rank holds every parameter in full."""
    inner = inner_optimizer(engine)
    fragments = []
    for param, flat, begin, start, numel in ranges(engine, mesh):
        # The weight and both moments have one layout: [begin, begin + numel) of each flat buffer is this range.
        whole = whole_parameter(engine.param_names[param], param, mesh.tensor_size)
        views = {"weight": flat.data.view(-1)} | {kind: _state(inner, flat)[kind].view(-1) for kind in KINDS[1:]}
        fragments.append(Fragment(whole, start, {kind: view[begin : begin + numel] for kind, view in views.items()}))
    return fragments


def owned(engine: DeepSpeedEngine, mesh: Mesh) -> list[Fragment]:
    """Return the fragments that this rank writes to a checkpoint: every element is owned by exactly one rank."""
    fragments = [f for f in held(engine, mesh) if f.parameter.cut is not None or mesh.tensor_rank == 0]
    if engine.zero_optimization_stage():
        return fragments
    # With ZeRO 0 all data ranks hold the same: each owns an equal range of every fragment.
    rank, size = mesh.data_rank, mesh.data_size
    shares = [(f, f.numel * rank // size, f.numel * (rank + 1) // size) for f in fragments]
    return [f.narrowed(first, last - first) for f, first, last in shares if last > first]


def parameters(engine: DeepSpeedEngine, tensor_size: int) -> list[Parameter]:
    """Return all parameters of the model, including those of which this rank holds nothing."""
    return [whole_parameter(name, param, tensor_size) for param, name in engine.param_names.items()]


def whole_parameter(name: str, param: nn.Parameter, tensor_size: int) -> Parameter:
    """Return name, whole shape and cut, read from the attributes that megatron-core's layers set on a parameter."""
    shape = list(getattr(param, "ds_shape", param.shape))  # ZeRO 3 leaves param itself empty
    cut = None
    if getattr(param, "tensor_model_parallel", False) and tensor_size > 1:
        cut = Cut(param.partition_dim, param.partition_stride)  # type: ignore[attr-defined]
        shape[cut.dim] *= tensor_size
    return Parameter(name, tuple(shape), cut)


def updates(engine: DeepSpeedEngine) -> int:
    """Return AdamW's count of steps, by which it corrects the moments' bias. Skipped steps do not count."""
    steps = {int(state["step"]) for state in inner_optimizer(engine).state.values()}
    assert len(steps) <= 1, f"parameters have taken different numbers of steps: {steps}"
    return steps.pop() if steps else 0


@torch.no_grad()
def refresh(engine: DeepSpeedEngine, mesh: Mesh, num_updates: int) -> None:
    """Copy the fp32 weights, just written through the views, to the model, and set AdamW's step count. Collective."""
    inner, optimizer = inner_optimizer(engine), engine.optimizer
    for _, flat, *_ in ranges(engine, mesh):
        _state(inner, flat)["step"].fill_(float(num_updates))
    # DeepSpeed's own ways from the fp32 buffers to the model's weights after a step, one for each kind of optimizer.
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif isinstance(optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer):
        optimizer.update_lp_params()
    else:
        for param, flat, *_ in ranges(engine, mesh):
            if flat is not param:  # in fp32 the views are the model's own weights
                param.copy_(flat)


def ranges(engine: DeepSpeedEngine, mesh: Mesh) -> Iterator[tuple[nn.Parameter, Tensor, int, int, int]]:
    """Yield each range that this rank's optimizer steps.

    It is (parameter, flat fp32 buffer, start in the buffer, start in the parameter, number of elements).
    """
    optimizer: Any = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        # ZeRO 3 cuts every parameter into one equal partition for each data rank.
        for group in optimizer.fp16_groups:
            for param in group:
                number, begin, numel = optimizer.grad_position[optimizer.get_param_id(param)]
                start = mesh.data_rank * numel
                inside = min(numel, param.ds_numel - start)  # the last ranks' partitions are padded
                if inside > 0:
                    yield param, optimizer.fp32_partitioned_groups_flat[number], begin, start, inside
    elif isinstance(optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer):
        # ZeRO 1 and 2 cut a group's concatenated parameters, so this rank may hold a part of a parameter, or nothing
        # (`_hp_mapping` is None). "hp" (high precision) is the fp32 buffer, "lp" the parameter. ZeRO 1 with bf16
        # weights and fp32 gradients is a class of its own, with other names for the same two.
        if isinstance(optimizer, BF16_Optimizer):
            groups, flats = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
        else:
            groups, flats = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
        for params, flat in zip(groups, flats, strict=True):
            for param in params:
                if (mapping := param._hp_mapping) is not None:
                    in_buffer, in_param = mapping.hp_fragment_address, mapping.lp_fragment_address
                    yield param, flat, in_buffer.start, in_param.start, in_buffer.numel
    else:
        # ZeRO 0 steps each parameter's whole fp32 value, which is the parameter itself where that is fp32.
        for param in engine.param_names:
            yield param, getattr(param, "fp32_weight", param), 0, 0, param.numel()


def inner_optimizer(engine: DeepSpeedEngine) -> torch.optim.AdamW:
    """Return the plain torch optimizer that steps the flat buffers."""
    optimizer: Any = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.AdamW) else optimizer.optimizer


def _state(inner: torch.optim.AdamW, flat: Tensor) -> dict[str, Tensor]:
    """Return AdamW's state of a flat buffer; before the first step, make it as the zeros AdamW begins with."""
    state = inner.state[flat]
    if not state:
        state["step"] = torch.tensor(0.0, dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(flat, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(flat, memory_format=torch.preserve_format)
    return state
