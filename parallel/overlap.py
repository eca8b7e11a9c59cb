"""ZeRO 1's fp32 gradients, summed over ranks while the last backward of a step still computes others.

DeepSpeed's `BF16_Optimizer` adds each gradient to a flat fp32 buffer as soon as the backward has it, and its engine
sums the whole buffer over ranks when the backward is done. Here the buffer is cut into buckets, and each is summed when
its last gradient is there. No memory is needed beside the buffer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn


class Bucket(NamedTuple):
    """Range of a flat fp32 buffer, and the parameters whose gradients it holds."""

    sums: Tensor
    parameters: list[nn.Parameter]


class OverlappedSums:
    """Sums of an engine's gradients over the ranks of a group, bucket by bucket, in place of the engine's own sum.

    All ranks begin the buckets in one order, from the last parameters of the model to the first, as the backward
    computes their gradients.
    """

    def __init__(self, engine: DeepSpeedEngine, group: dist.ProcessGroup, bucket_elements: int) -> None:
        """Cut the buffers into buckets of at least `bucket_elements` elements; the last of a buffer may have fewer."""
        assert isinstance(engine.optimizer, BF16_Optimizer)
        self._engine, self._group = engine, group
        order = {param: at for at, param in enumerate(engine.param_names)}
        self._buckets = _buckets(engine.optimizer, order, bucket_elements)
        self._bucket_of = {param: number for number, (_, held) in enumerate(self._buckets) for param in held}
        self._works: list[dist.Work] = []
        self._reset()
        for param in self._bucket_of:  # after DeepSpeed's own hook, which has added the gradient to the buffer
            param.register_post_accumulate_grad_hook(self._arrived)
        # The engine calls this method of an optimizer that has it, after the last backward of a step.
        engine.optimizer.reduce_gradients = self._finish  # type: ignore[attr-defined]

    def _reset(self) -> None:
        self._missing = [len(bucket.parameters) for bucket in self._buckets]
        self._works.clear()

    def _arrived(self, param: nn.Parameter) -> None:
        """Note that the buffer has the gradient of a parameter; begin the buckets that are complete."""
        if not self._engine.is_gradient_accumulation_boundary():
            return
        self._missing[self._bucket_of[param]] -= 1
        while len(self._works) < len(self._buckets) and not self._missing[len(self._works)]:
            self._begin()

    def _begin(self) -> None:
        sums = self._buckets[len(self._works)].sums
        work = dist.all_reduce(sums, group=self._group, async_op=True)
        assert work is not None, "this rank is in the group"
        self._works.append(work)

    def _finish(self, **_: bool) -> None:
        """Begin the buckets that still miss a gradient, wait for all buckets, and turn sums into means. Collective."""
        while len(self._works) < len(self._buckets):
            self._begin()
        for work, bucket in zip(self._works, self._buckets, strict=True):
            work.wait()  # on a GPU only the device waits
            bucket.sums.div_(self._group.size())
        self._reset()


def _buckets(optimizer: BF16_Optimizer, order: dict[nn.Parameter, int], bucket_elements: int) -> list[Bucket]:
    """Cut the flat buffers into buckets, given the position of each parameter in the model; the last come first."""
    found = []
    for parameters, flat in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients_flat, strict=True):
        held: list[nn.Parameter] = []
        stop = start = sum(param.numel() for param in parameters)  # beyond it the buffer is padded
        for param in reversed(parameters):
            held.append(param)
            start -= param.numel()
            if stop - start >= bucket_elements or start == 0:
                found.append(Bucket(flat[start:stop], held))
                held, stop = [], start
    # A bucket is complete with the gradient of the earliest of its parameters.
    return sorted(found, key=lambda bucket: -min(order[param] for param in bucket.parameters))
