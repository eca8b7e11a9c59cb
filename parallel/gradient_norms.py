"""The norm of the gradient by part of the model, at any ZeRO stage and tensor-parallel degree."""

from __future__ import annotations

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from .fragments import inner_optimizer, ranges, whole_parameter
from .mesh import Mesh


class GradientNorms:
    """Sums of the gradient's squares by part of the model: each layer, the embedding, the last norm, and the head.

    The squares are summed just before AdamW steps. By then DeepSpeed has summed and clipped the gradients, each stage
    in its own way, in the flat fp32 buffers that the optimizer steps, one buffer after the other.
    """

    def __init__(self, engine: DeepSpeedEngine, mesh: Mesh, every_steps: int) -> None:
        self._engine, self._mesh, self._every_steps = engine, mesh, every_steps
        parts = dict.fromkeys(part_of(name) for name in engine.param_names.values())
        self._index = {part: index for index, part in enumerate(parts)}
        self._squares: Tensor | None = None
        inner_optimizer(engine).register_step_pre_hook(self._add)

    def before(self, step: int) -> None:
        """Begin the sums if `step` is a multiple of `every_steps` (0: never). Other steps cost nothing."""
        if self._every_steps and step % self._every_steps == 0:
            self._squares = torch.zeros(len(self._index), dtype=torch.float64, device=self._mesh.device)

    def take(self, norm: float) -> dict[str, float]:
        """Return the gradient norm of each part in this step, before clipping, by part. Collective.

        `norm` is the norm of the whole gradient before clipping. The result is empty for a step without sums; its norms
        are not finite if `norm` is not.
        """
        if self._squares is None:
            return {}
        squares, self._squares = self._squares, None
        if self._engine.zero_optimization_stage():
            dist.all_reduce(squares, group=self._mesh.data_group)
        dist.all_reduce(squares, group=self._mesh.tensor_group)
        # Clipping has multiplied all gradients by one factor, which leaves each part its share of the whole.
        norms = norm * (squares / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)).sqrt()
        return dict(zip(self._index, norms.tolist(), strict=True))

    @torch.no_grad()
    def _add(self, optimizer: torch.optim.Optimizer, *arguments: object) -> None:
        if self._squares is None:
            return
        stepped = {id(flat): flat.grad for group in optimizer.param_groups for flat in group["params"]}
        for param, flat, begin, _, numel in ranges(self._engine, self._mesh):
            name, gradient = self._engine.param_names[param], stepped.get(id(flat))
            # A parameter that all tensor-parallel ranks hold whole has equal gradients on them, which count once.
            own = self._mesh.tensor_rank == 0 or whole_parameter(name, param, self._mesh.tensor_size).cut is not None
            if gradient is not None and own:
                part = gradient.view(-1)[begin : begin + numel]
                self._squares[self._index[part_of(name)]] += torch.linalg.vector_norm(part, dtype=torch.float64) ** 2


def part_of(name: str) -> str:
    """Return the part of the model that a parameter belongs to: `blocks.3`, `embedding`, `norm` or `head`."""
    return ".".join(name.split(".")[: 2 if name.startswith("blocks.") else 1])
