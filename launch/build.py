"""Where the columns meet: the model gets its attention from parallel, its rows from data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """Of one sequence, as if it were one document."""
    attention: Callable[[SeqLayout], AttentionFunction]

    def model_inputs(
        self, rows: NDArray[np.unsignedinteger], document_starts: Sequence[tuple[int, ...]] | None, device: torch.device
    ) -> tuple[Tensor, Tensor, SeqLayout, AttentionFunction]:
        """Tokens, targets, layout and attention for this rank's share of sequences `[b, length + 1]`.

        Where the rows have `document_starts`, one tuple a row, whole sequences are laid end to end as one of b = 1,
        since a batch shares one mask; RoPE tells distances only, so positions that run on change nothing.
        """
        # Whole rows travel, as stored: they may lie in page-locked memory, and the copy is then not waited for.
        whole = torch.from_numpy(rows).to(device, non_blocking=True).long()
        positions = self.layout.positions(device)
        tokens, targets = whole[:, positions], whole[:, positions + 1]
        layout = self.layout
        if document_starts is not None and self.context_parallel > 1:
            [starts] = document_starts  # a ring holds one sequence at a time
            layout = SeqLayout(layout.runs, starts)
        elif document_starts is not None:
            length = layout.num_tokens
            starts = tuple(row * length + start for row, found in enumerate(document_starts) for start in found)
            layout = SeqLayout(((0, len(rows) * length),), starts)
            tokens, targets = tokens.reshape(1, -1), targets.reshape(1, -1)
        return tokens, targets, layout, self.attention(layout)

    def trained(self, trained: NDArray[np.bool_] | None, losses: Tensor) -> Tensor:
        """Which `losses` count, 1 or 0 in their shape, of targets `[b, length]` of whole sequences; all for None."""
        if trained is None:
            return torch.ones_like(losses)
        positions = self.layout.positions(losses.device)
        return torch.from_numpy(trained).to(losses.device)[:, positions].to(losses.dtype).view_as(losses)


def place(sequence_tokens: int, recipe: Recipe, mesh: Mesh) -> Place:
    """Where sequences of this length go: whole ones side by side, or one spread over a ring."""
    parallel, backend = recipe.parallel, recipe.train.attention_backend
    degree = parallel.context_parallel(sequence_tokens)
    ring = mesh.rings[degree]

    def attention_of(layout: SeqLayout) -> AttentionFunction:
        if degree == 1:
            return partial(attention, mask=make_mask(layout, layout, device=mesh.device), backend=backend)
        return partial(token_ring_attention, layout=layout, ring=ring, backend=backend)

    return Place(
        context_parallel=degree,
        replica=mesh.data_rank // degree,
        num_replicas=mesh.data_size // degree,
        sequences_per_replica=parallel.sequences_per_replica(sequence_tokens),
        layout=SeqLayout.contiguous(sequence_tokens) if degree == 1 else ring.layout(sequence_tokens),
        attention=attention_of,
    )


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
