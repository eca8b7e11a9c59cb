"""Memory of a rank at the peak of a step, by kind, computed from the recipe alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

from ...parallel.cp.choose import PricedGrid
from ..config import Recipe

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


def device_bytes(name: str) -> float | None:
    """Return the bytes of memory of a device's data sheet; None: they are not known here."""
    return next((number for pattern, number in DEVICE_BYTES.items() if re.fullmatch(pattern, name)), None)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a rank holds on its device at the peak of a step, by kind."""

    moment: str
    """Part of the step that holds most: "loss", "backward" or "update"."""
    weights: int
    """Weights in train.dtype: this rank's, and under ZeRO 3 its part and the gathered ones."""
    gradients: int
    """Sums of gradients between micro-batches."""
    moments: int
    """AdamW's two moments and the fp32 weights that it steps."""
    buckets: int
    """Buffers by which ZeRO sums gradients and gathers weights."""
    activations: int
    """Activations that the forward keeps for the backward, of all layers."""
    logits: int
    """Logits that are kept, and those of the slice at hand."""
    work: int
    """Tensors of the operation at hand: a layer computed again, gradients of activations, a step's copies."""
    attention: int
    """Shares and results that attention holds for other ranks."""
    communicators: int
    """NCCL's buffers (estimate)."""
    reserve: int
    """CUDA's context and the allocator's gaps (estimate)."""
    host: int
    """Bytes of the host's memory, no part of the total: what is offloaded."""

    @property
    def total(self) -> int:
        """Bytes on the device, of all kinds."""
        return sum(self.by_kind().values())

    def by_kind(self) -> dict[str, int]:
        """Return the bytes on the device by kind."""
        return {kind.name: getattr(self, kind.name) for kind in fields(self) if kind.name not in ("moment", "host")}


def memory_of(
    recipe: Recipe,
    world_size: int,
    length: int,
    vocab_size: int,
    *,
    on_gpu: bool = True,
    grids: Sequence[PricedGrid] = (),
) -> Memory:
    """Return the memory of a rank at the peak of a step on the bucket of `length` tokens.

    `vocab_size` is the tokenizer's. `grids` are those of the layer kinds of this bucket; without any, attention holds
    nothing of other ranks. Off a GPU, operators are torch's own, and there is neither reserve nor communicator. Raises
    ValueError if parallel.tensor does not divide the world.
    """
    model, parallel, train = recipe.model, recipe.parallel, recipe.train
    tensor, ranks = parallel.tensor, parallel.data_size(world_size)
    itemsize = 4 if train.dtype == "float32" else 2
    rows = model.padded_vocab_size(vocab_size)
    width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer = model.hidden_size * (2 * width + 2 * kv_width + 3 * model.ffn_hidden_size)
    count = (model.num_layers * layer + (1 if model.tied_head else 2) * rows * model.hidden_size) // tensor
    part = count // ranks
    stage, tokens = parallel.zero_stage, parallel.tokens_per_rank
    kept = {
        "keep": 6 * model.hidden_size + 2 * (kv_width + width) // tensor + 3 * model.ffn_hidden_size // tensor,
        "recompute_mlp": 3 * model.hidden_size + 2 * (kv_width + width) // tensor,
        "recompute_layer": model.hidden_size + 2 * (kv_width + width) // tensor,
        "offload": model.hidden_size + 2 * (kv_width + width) // tensor,
    }[train.memory.activations]
    activations = itemsize * tokens * kept * model.num_layers
    host, activations = (activations, 0) if train.memory.activations == "offload" else (0, activations)
    moments = 12 * (part if stage else count)
    if parallel.zero.offload_optimizer == "cpu":
        host, moments = host + moments, 0
    return Memory(
        moment="backward",
        weights=itemsize * (part if stage == 3 else count),
        gradients=4 * (part if stage > 1 else count),
        moments=moments,
        buckets=8 * parallel.zero.reduce_bucket_size if stage > 1 else 0,
        activations=activations,
        logits=min(itemsize * tokens * rows // tensor, int(train.memory.kept_logits_gb * 1e9)),
        work=itemsize * tokens * 6 * model.ffn_hidden_size // tensor,
        attention=max((grid.peak_bytes for grid in grids), default=0),
        communicators=0,
        reserve=int(3e9) if on_gpu else 0,
        host=host,
    )
