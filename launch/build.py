"""Where the columns meet: the model gets its attention from parallel, its rows from data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.attention import attention
from ..kernels.layout import SeqLayout
from ..kernels.mask import make_mask
from ..model.attention import AttentionFunction
from ..model.transformer import Transformer
from ..parallel.cp.token_ring import token_ring_attention
from ..parallel.mesh import Mesh, megatron_config
from ..parallel.zero import DeepSpeedEngine, zero_engine
from .config import Recipe


@dataclass(frozen=True)
class Place:
    """How the sequences of one length lie on this rank's replica (the ranks of one ring)."""

    context_parallel: int
    replica: int
    num_replicas: int
    sequences_per_replica: int
    layout: SeqLayout
    attention: AttentionFunction


def place(sequence_tokens: int, recipe: Recipe, mesh: Mesh) -> Place:
    """Where sequences of this length go: whole ones side by side, or one spread over a ring."""
    parallel, backend = recipe.parallel, recipe.train.attention_backend
    degree = parallel.context_parallel(sequence_tokens)
    ring = mesh.rings[degree]
    if degree == 1:
        layout = SeqLayout.contiguous(sequence_tokens)
        attend = partial(attention, mask=make_mask(layout, layout, device=mesh.device), backend=backend)
    else:
        layout = ring.layout(sequence_tokens)
        attend = partial(token_ring_attention, layout=layout, ring=ring, backend=backend)
    return Place(
        context_parallel=degree,
        replica=mesh.data_rank // degree,
        num_replicas=mesh.data_size // degree,
        sequences_per_replica=parallel.sequences_per_replica(sequence_tokens),
        layout=layout,
        attention=attend,
    )


def inputs_and_targets(rows: NDArray[np.int64], layout: SeqLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """This rank's share `[b, layout.num_tokens]` of sequences `[b, length + 1]`: tokens, and the token after each."""
    positions = layout.positions()
    whole = torch.from_numpy(rows)
    return whole[:, positions].to(device), whole[:, positions + 1].to(device)


def build_engine(recipe: Recipe, vocab_size: int, mesh: Mesh) -> DeepSpeedEngine:
    """The model with its optimizer under DeepSpeed. Equal seeds give equal weights on any mesh. Collective."""
    torch.manual_seed(recipe.train.seed)
    model = Transformer(recipe.model, vocab_size, megatron_config(recipe.parallel)).to(mesh.device)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.train.learning_rate,
        betas=(recipe.train.beta1, recipe.train.beta2),
        weight_decay=recipe.train.weight_decay,
    )
    return zero_engine(
        model,
        optimizer,
        recipe.parallel,
        mesh,
        accumulation_steps=recipe.accumulation_steps(mesh.world_size),
        clip_grad_norm=recipe.train.clip_grad_norm,
        dtype=recipe.train.dtype,
    )
