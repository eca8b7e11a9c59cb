"""The initial weights: a parameter's values depend on the seed and its name alone, and are made on its device."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .config import ModelConfig


def values_later(weight: Tensor) -> None:
    """Leave a new weight without values: megatron-core's `init_method`, before `fill_weights` gives it some."""


@torch.no_grad()
def fill_weights(
    model: nn.Module,
    config: ModelConfig,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    filled: Callable[[nn.Module], None] = lambda _: None,
) -> None:
    """Replace each parameter of `model`, which may be on the meta device, by one of initial values in `dtype`.

    Norm weights are 1, biases 0, and matrices normal with `initial_std`. Equal seeds give equal values on any mesh: a
    matrix is drawn whole in fp32, and a tensor-parallel rank keeps its part, so one whole matrix is the most that
    exists beside the model. `filled` is called with each module whose own parameters have values. GPUs and CPUs draw
    different numbers, and so do GPUs with different numbers of multiprocessors.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}  # a tied weight belongs to two modules
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        for leaf, before in own.items():
            if before in made:
                setattr(module, leaf, made[before])
                continue
            name = f"{path}.{leaf}" if path else leaf
            group = module.tp_group if getattr(before, "tensor_model_parallel", False) else None
            values = torch.empty(before.shape, dtype=dtype, device=device)
            values.copy_(_drawn(name, before, initial_std(name, config), seed, device, group))
            after = nn.Parameter(values)
            vars(after).update(vars(before))  # megatron-core's marks of how the parameter is divided
            setattr(module, leaf, after)
            made[before] = after
        if own:
            filled(module)


def initial_std(name: str, config: ModelConfig) -> float:
    """Return the standard deviation of a matrix's initial values, less for those that write to the residual stream.

    As in GPT-2: the stream adds up the results of two such matrices a layer, so the variance of each is divided by
    2 num_layers.
    """
    writes_to_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
    return config.init_std / (2 * config.num_layers) ** 0.5 if writes_to_residual else config.init_std


def _drawn(name: str, param: Any, std: float, seed: int, device: torch.device, group: Any) -> Tensor:
    """Return this rank's part of a parameter's initial values, fp32; `group` is None if the rank holds it whole."""
    if param.dim() == 1:
        return torch.full(param.shape, float(not name.endswith("bias")), device=device)
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]
    generator = torch.Generator(device).manual_seed(int.from_bytes(key))
    shape, ranks = list(param.shape), group.size() if group else 1
    if group:
        shape[param.partition_dim] *= ranks
    whole = torch.empty(shape, device=device).normal_(0, std, generator=generator)
    if not group:
        return whole
    # The divided dim holds `stride` matrices one after the other, such as gate and up; a rank has a part of each.
    dim, stride = param.partition_dim, param.partition_stride
    parts = whole.unflatten(dim, (stride, ranks, -1))  # [.., stride, rank, rows of one part, ..]
    return parts.select(dim + 1, group.rank()).flatten(dim, dim + 1)
