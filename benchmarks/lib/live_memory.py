"""Bytes of all tensors that live on a rank without a GPU, which has no counter of its own, and their peak in a step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from longring.launch.build import bucket_layouts, build_engine
from longring.launch.config import Recipe
from longring.launch.fit.memory import Memory, moments
from longring.launch.grids.choice import choose_grids
from longring.parallel.cp.cost import ASSUMED
from longring.parallel.cp.topology import PRESETS
from longring.parallel.mesh import join
from longring.parallel.zero import set_learning_rate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Context that counts the bytes of each storage from the operator that makes it until nothing holds it.

    `torch.distributed._tools.mem_tracker.MemTracker` counts alike, and by module, but takes a module for one pass only.
    Scratch memory within an operator is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[str, int] = {}
        """Largest number of bytes in each part of the step."""
        self._live, self._part = 0, ""
        self._known: set[int] = set()

    def at(self, part: str) -> None:
        """Count for a part of the step from here on."""
        self._part = part
        self.peaks[part] = max(self._live, self.peaks.get(part, 0))

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._count(tensor.untyped_storage())
        self.peaks[self._part] = max(self._live, self.peaks.get(self._part, 0))
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self._live += size
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


class Compared(NamedTuple):
    """Memory of a rank in one step."""

    measured: Mapping[str, int]
    """Largest number of bytes in each part of the step: forward, backward and update."""
    predicted: list[Memory]
    """Prediction for each moment of the step."""

    @property
    def peak(self) -> int:
        """Largest number of bytes measured."""
        return max(self.measured.values())

    @property
    def expected(self) -> Memory:
        """Prediction for the moment with most bytes; the host's are this machine's as well."""
        return max(self.predicted, key=lambda memory: memory.total + memory.host)

    @property
    def ratio(self) -> float:
        """Predicted bytes over those measured."""
        return (self.expected.total + self.expected.host) / self.peak


def compare(recipe: Recipe, length: int, vocab_size: int) -> Compared:
    """Return the memory of the second step on a bucket of `length` tokens, which has AdamW's moments. Collective."""
    world_size = dist.get_world_size()
    mesh = join(recipe.parallel, recipe.max_context_parallel)
    topology = PRESETS["nvswitch"](world_size)
    choices = choose_grids(recipe, [length], topology, ASSUMED) if recipe.parallel.context_parallel(length) > 1 else []
    live = LiveMemory()
    with live:
        live.at("start")
        engine = build_engine(recipe, vocab_size, mesh)
        layout = bucket_layouts(recipe, mesh, [length], {choice.kind: choice.grid for choice in choices})[length]
        set_learning_rate(engine, 1e-3)
        rows = np.random.default_rng(layout.replica)
        for _ in range(2):
            live.peaks.clear()
            for _ in range(recipe.accumulation_steps(world_size)):
                batch = rows.integers(0, vocab_size, (layout.sequences_per_replica, length + 1)).astype(np.uint16)
                inputs = layout.model_inputs(batch, None, mesh.device)
                live.at("forward")
                losses = engine(*inputs)
                live.at("backward")
                engine.backward(losses.sum())
                del losses, inputs
                live.at("update")
                engine.step()
    grids = [choice.taken for choice in choices]
    return Compared(live.peaks, moments(recipe, world_size, length, vocab_size, on_gpu=False, grids=grids))
