"""Rates of this machine's ranks, measured while all of them compute, as ranks may share cores and memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ...model.fused import fused_ops
from ...parallel.cp.cost import Speed
from ...parallel.cp.topology import Topology
from .device import Device
from .links import gather_s
from .time import ADAMW_BYTES, FUSED_ADAMW_BYTES

SAMPLES = 5
"""Timed calls of each kind, after one that warms it up; the median counts."""
SUM_ELEMENTS = 2**21
"""Elements of the sum over all ranks, and of the copies to the host."""
UPDATE_ELEMENTS = 2**24
"""Weights that AdamW steps: with gradients and moments 256 MiB, more than caches hold."""


class Sizes(NamedTuple):
    """Sizes of the products and operators that are timed: those of a model."""

    tokens: int
    hidden: int
    ffn: int
    """Width of SwiGLU on one tensor-parallel rank."""


def measure_device(sizes: Sizes, dtype: torch.dtype, device: torch.device, speed: Speed, topology: Topology) -> Device:
    """Return what the ranks of the world reach together; the slowest counts. Collective.

    Operators are those of the model, which take several passes on a CPU, and their tensors count as read and written
    once. AdamW is the one that training takes on the device, and on the host.
    """
    s, h, f = sizes
    x, hidden = _random(s, h, dtype=dtype, device=device), _random(s, 2 * f, dtype=dtype, device=device)
    norm, itemsize = _random(h, dtype=dtype, device=device), x.itemsize
    # SwiGLU's two weights, and one as large as that of q or of the projection after attention.
    weights = [_random(n, k, dtype=dtype, device=device).detach() for n, k in ((2 * f, h), (h, f), (h, h))]
    inputs = [torch.randn(s, weight.shape[1], device=device).to(dtype) for weight in weights]

    def products() -> None:
        for weight, rows in zip(weights, inputs, strict=True):
            result = rows @ weight.t()  # [s, n]
            _ = result @ weight, result.t() @ rows  # [s, k], [n, k]: sizes of the two gradients

    ops = fused_ops(x)

    def operators() -> None:
        passes = ((ops.rms_norm(x.view(s, 1, h), norm, 1e-5), x), (ops.swiglu(hidden), hidden))
        for result, inputs in passes:
            torch.autograd.grad(result, inputs, torch.ones_like(result))

    to_sum, on_host = torch.zeros(SUM_ELEMENTS, device=device), torch.zeros(SUM_ELEMENTS)
    # Forward: norm 2 h, SwiGLU 3 f; backward: norm 3 h, SwiGLU 5 f.
    moved = itemsize * s * (5 * h + 8 * f)
    # The weights have h (3 f + h) elements, each of which takes 2 FLOPs a row forward and 4 backward.
    product_flops = 6.0 * s * h * (3 * f + h) / _seconds(products, device)
    ranks = dist.get_world_size()
    share = 1.0
    if ranks > 1:
        expected = 2 * gather_s(topology, ranks, to_sum.nbytes, 1.0)  # at the whole bandwidth
        share = expected / _seconds(lambda: dist.all_reduce(to_sum), device)
    # One copy in each direction, the second after the first.
    copied = 2 * on_host.nbytes / _seconds(lambda: (on_host.to(device, copy=True), to_sum.to("cpu", copy=True)), device)
    host = _update_rate(torch.device("cpu"), device)
    return Device(
        f"{ranks} ranks, measured on {device.type}",
        _memory_bytes(device),
        product_flops,
        product_flops,
        moved / _seconds(operators, device),
        _update_rate(device, device) if device.type == "cuda" else host,
        copied,
        host,
        speed,
        share,
        is_gpu=device.type == "cuda",
    )


def _update_rate(where: torch.device, device: torch.device) -> float:
    """Return the bytes a second of an update of fp32 weights that lie `where`, by the ranks of `device`. Collective."""
    numbers = torch.nn.Parameter(torch.zeros(UPDATE_ELEMENTS, device=where))
    numbers.grad = torch.ones_like(numbers)
    on_host = where.type == "cpu"
    adamw = torch.optim.AdamW([numbers], fused=on_host or None)
    moved = FUSED_ADAMW_BYTES if on_host else ADAMW_BYTES
    return moved * UPDATE_ELEMENTS / _seconds(lambda: adamw.step(), device)


def _random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def _memory_bytes(device: torch.device) -> float:
    """Return a rank's memory: of its GPU, or its part of the host's."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / local


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median of the seconds of a call on the slowest rank; all ranks start together. Collective."""
    samples = []
    for _ in range(SAMPLES + 1):
        dist.barrier()
        started = time.perf_counter()
        with torch.enable_grad():
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append(time.perf_counter() - started)
    times = torch.tensor(samples[1:], dtype=torch.float64, device=device)
    dist.all_reduce(times, dist.ReduceOp.MAX)  # [SAMPLES], of the slowest rank in each
    return float(times.median())
