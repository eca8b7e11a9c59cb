"""Memory of a rank at the peak of a step, by kind, computed from the recipe alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache

from ...parallel.cp.choose import PricedGrid
from ...parallel.cp.grid import CpGrid
from ...parallel.cp.group import all_links, link_bytes, links_of
from ...parallel.cp.plan import Link
from ..config import Recipe
from .activations import activations_of
from .states import Sizes, States

DEVICE_BYTES = {
    # https://www.nvidia.com/en-us/data-center/h100/: 80 GB (SXM, PCIe), 94 GB (NVL)
    r"NVIDIA H100 80GB HBM3": 80e9,
    r"NVIDIA H100 NVL": 94e9,
    r"NVIDIA H100 PCIe": 80e9,
    # https://www.nvidia.com/en-us/data-center/h200/: 141 GB
    r"NVIDIA H200": 141e9,
    # https://www.nvidia.com/en-us/data-center/a100/: 40 or 80 GB, as the name says
    r"NVIDIA A100\b.*80GB": 80e9,
    r"NVIDIA A100\b.*40GB": 40e9,
    # https://nvdam.widen.net/s/wwnsxrhm2w/blackwell-datasheet-3384703: up to 186 GB for GB200, 180 GB for HGX B200
    r"NVIDIA B200": 180e9,
    r"NVIDIA GB200": 186e9,
}
"""Bytes of NVIDIA's data sheets by a pattern of the device's whole name, as of `flops.PEAK_FLOPS`."""


GIB = 2**30
RESERVE = 3_000_000_000
"""Estimate of the bytes that CUDA's context, cuBLAS and the gaps of torch's allocator take; **not measured**."""


def device_bytes(name: str) -> float | None:
    """Return the bytes of memory of a device's data sheet; None: they are not known here."""
    return next((number for pattern, number in DEVICE_BYTES.items() if re.fullmatch(pattern, name)), None)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a rank holds on its device at the peak of a step, by kind."""

    moment: str
    """Part of the step that holds most: "loss", "backward", "end" of the backward, "sum" or "update"."""
    weights: int
    """Weights in train.dtype: this rank's, and under ZeRO 3 its part and the gathered ones."""
    gradients: int
    """Sums of gradients between micro-batches."""
    moments: int
    """AdamW's two moments and the fp32 weights that it steps."""
    buckets: int = 0
    """Buffers by which ZeRO sums gradients and gathers weights."""
    activations: int = 0
    """Activations that the forward keeps for the backward, of all layers."""
    logits: int = 0
    """Logits that are kept, and those of the slice at hand."""
    workspace: int = 0
    """Tensors of the operation at hand: a layer computed again, gradients of activations, a step's copies."""
    attention: int = 0
    """Shares and results that attention holds for other ranks."""
    communicators: int = 0
    """Buffers of NCCL for the messages of this bucket's attention (estimate)."""
    reserve: int = 0
    """CUDA's context and the allocator's gaps (estimate)."""
    host: int = 0
    """Bytes of the host's memory, no part of the total: what is offloaded."""

    @property
    def total(self) -> int:
        """Bytes on the device, of all kinds."""
        return sum(self.by_kind().values())

    def by_kind(self) -> dict[str, int]:
        """Return the bytes on the device by kind."""
        return {kind.name: getattr(self, kind.name) for kind in fields(self) if kind.name not in ("moment", "host")}


def peak(moments: Iterable[Memory]) -> Memory:
    """Return the memory of the moment that takes the most."""
    return max(moments, key=lambda moment: moment.total)


def moments(
    recipe: Recipe,
    world_size: int,
    length: int,
    vocab_size: int,
    *,
    on_gpu: bool = True,
    grids: Sequence[PricedGrid] = (),
) -> list[Memory]:
    """Return the memory of a rank at the moments of a step on the bucket of `length` tokens of which one is the peak.

    `vocab_size` is the tokenizer's. `grids` are those of the layer kinds of this bucket; without any, attention holds
    nothing of other ranks. Off a GPU, operators are torch's own, and there is neither reserve nor communicator. Raises
    ValueError if parallel.tensor does not divide the world.
    """
    ranks = recipe.parallel.data_size(world_size)
    states = States(recipe, Sizes.of(recipe, vocab_size), ranks, on_gpu)
    kept = activations_of(recipe, vocab_size, length, on_gpu=on_gpu)
    attention = max((grid.peak_bytes for grid in grids), default=0)
    always = Memory(
        moment="",
        weights=states.weights + states.gathered,
        gradients=states.gradients,
        moments=states.moments,
        buckets=states.buckets,
        communicators=_link_bytes(tuple(grid.grid for grid in grids), recipe.parallel.cp.max_ctas) if on_gpu else 0,
        reserve=RESERVE if on_gpu else 0,
        host=states.host + kept.host,
    )
    return [
        replace(
            always,
            moment="loss",
            activations=kept.layers + kept.around,
            logits=kept.kept_logits,
            workspace=kept.loss_workspace,
        ),
        replace(
            always,
            moment="backward",
            # The loss has freed the logits, and what the final norm kept.
            activations=kept.layers,
            workspace=kept.layer_workspace + states.gradient_workspace,
            attention=attention,
        ),
        # ZeRO 0 sums over ranks after the backward, when no activations are left; elsewhere `sum_workspace` is 0.
        replace(always, moment="sum", workspace=states.sum_workspace, host=states.host),
        replace(
            always,
            moment="end",
            gradients=states.gradients + states.summed_part,
            host=states.host,
            activations=kept.layer,
            workspace=kept.layer_workspace + states.gradient_workspace,
            attention=attention,
        ),
        replace(
            always,
            moment="update",
            weights=states.weights,  # without the gathered ones, which ZeRO 3 has released
            gradients=states.update_gradients,
            buckets=states.buckets if recipe.parallel.zero_stage == 3 else 0,
            workspace=states.update_workspace,
            host=states.host,
        ),
    ]


@lru_cache
def _link_bytes(grids: tuple[CpGrid, ...], max_ctas: int) -> int:
    """Return an estimate of the bytes that NCCL takes on a rank for the links of some grids."""
    # Rank 0 stands for every rank.
    links = set[Link]().union(*(links_of(all_links(grid), 0) for grid in grids))
    return link_bytes(links, 0, max_ctas)
