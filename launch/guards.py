"""A check before the first step: attention over several ranks equals attention on one rank.

It costs a few passes of a small model over a short sequence. It finds errors that otherwise only raise the loss: a rank
whose positions are off by one chunk still trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.layout import SeqLayout
from ..model.attention import AttentionFunction
from ..model.transformer import Transformer
from ..model.weights import fill_weights
from ..parallel.cp.grid import Layout
from ..parallel.cp.group import CpGroup
from ..parallel.cp.packed import divided
from ..parallel.mesh import Mesh, megatron_config
from .config import Recipe
from .together import first_of_any

TOKENS_PER_RANK = 26
"""Tokens of the checked sequence on each rank: two chunks of an odd length, so that documents and kernel blocks end
anywhere. Sequence parallelism rounds it up to a multiple of parallel.tensor."""
VOCABULARY = 128
"""Vocabulary size of the small model."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.03}
"""Maximum relative difference of losses and gradients, by dtype. tests/launch/test_guards.py holds that correct
attention differs by less than a third of it, and each fault there that is no leak by more than twice of it."""
SKETCH = 1024
"""Number of sums by which gradients are compared."""
SIGNS = 1_000_003
"""Number of random signs of these sums, a prime."""
_ADVICE = (
    "try another train.attention_backend, parallel.cp.schedule or parallel.cp.layout, and report this error of LongRing"
)


@dataclass(frozen=True)
class _Sample:
    """A small model and a sequence of two documents, on which attention over a group is checked."""

    model: Transformer
    tokens: Tensor
    """[1, num_tokens + 1]"""
    documents: tuple[int, int]
    """Position at which each document starts."""
    layouts: tuple[SeqLayout, ...]
    """Layout of each rank of the group."""
    group: CpGroup

    @property
    def mine(self) -> SeqLayout:
        return self.layouts[self.group.rank]

    @property
    def num_tokens(self) -> int:
        return self.tokens.shape[1] - 1

    def losses(self, tokens: Tensor, layout: SeqLayout, attention: AttentionFunction) -> Tensor:
        """Return the losses at the positions of `layout`, fp32 [positions]; `tokens` are [1, num_tokens + 1]."""
        at = layout.positions(tokens.device)  # [positions]
        return self.model(tokens[:, at], tokens[:, at + 1], layout, attention)[0].float()

    def gathered(self, share: Tensor) -> Tensor:
        """Return the losses of the group's ranks in order of position, [num_tokens]. Collective."""
        # Every position is on one rank and stays 0 on the others, so that the sum puts the shares together.
        of_all = torch.zeros(self.num_tokens, device=share.device)
        of_all[self.mine.positions(share.device)] = share.detach()
        self.group.add_up(of_all)
        return of_all


def check_attention(
    recipe: Recipe,
    mesh: Mesh,
    group: CpGroup,
    spread: Callable[[tuple[SeqLayout, ...]], AttentionFunction],
    whole: Callable[[SeqLayout], AttentionFunction],
) -> None:
    """Raise ValueError, on every rank of the world, unless a small model gives equal results over all groups and alone.

    `spread` returns attention over the group, for the layouts of its ranks, and `whole` on this rank alone. No loss may
    depend on a later token or on another document, and losses and gradients must equal those of one rank. Collective.
    """
    for layout in recipe.parallel.cp.layouts:
        sample = _make_sample(recipe, mesh, group, layout)
        found = _find_fault(sample, spread(sample.layouts), whole, getattr(torch, recipe.train.dtype))
        # A fault of one rank may show on few ranks only; all ranks raise the error, so that none goes on without these.
        if found := first_of_any(found):
            raise ValueError(
                f"context parallelism over {group.size} ranks: {found}, with documents divided by {layout!r}; {_ADVICE}"
            )


def _make_sample(recipe: Recipe, mesh: Mesh, group: CpGroup, layout: Layout) -> _Sample:
    """Return the sample of a recipe in a layout, with equal weights and tokens on every rank of the group."""
    divisor = recipe.parallel.tensor if recipe.parallel.sequence_parallel else 1
    num_tokens = group.size * math.ceil(TOKENS_PER_RANK / divisor) * divisor
    documents = (0, num_tokens // 3)  # two, since every layout of one document is zigzag's
    runs = divided(layout, num_tokens, documents, group.size)
    # The weights are so large that attention is far from uniform at any width; else it would hardly affect the loss.
    pattern = tuple(dict.fromkeys(recipe.model.kind_of(layer) for layer in range(recipe.model.num_layers)))
    config = replace(
        recipe.model,
        num_layers=len(pattern),
        layer_pattern=pattern,
        window_tokens=recipe.model.window_tokens if "window" in pattern else 0,
        init_std=recipe.model.hidden_size**-0.5,
    )
    model = Transformer(config, VOCABULARY, megatron_config(recipe.parallel))
    fill_weights(model, config, 0, mesh.device, getattr(torch, recipe.train.dtype))
    tokens = torch.randint(VOCABULARY, (1, num_tokens + 1), generator=torch.Generator().manual_seed(1))
    return _Sample(
        model,
        tokens.to(mesh.device),
        documents,
        tuple(SeqLayout(of_rank, documents) for of_rank in runs),
        group,
    )


def _find_fault(
    sample: _Sample, attention: AttentionFunction, whole: Callable[[SeqLayout], AttentionFunction], dtype: torch.dtype
) -> str | None:
    """Return the fault of attention over the group in words, or None. Collective."""
    leak = _find_leak(sample, attention)
    share = sample.losses(sample.tokens, sample.mine, attention)
    share.sum().backward()
    losses, gradient = sample.gathered(share), _sketch(sample.model)
    sample.group.add_up(gradient)
    sample.model.zero_grad()  # else the next backward would add to these gradients
    everything = SeqLayout(((0, sample.num_tokens),), sample.documents)
    alone = sample.losses(sample.tokens, everything, whole(everything))
    alone.sum().backward()
    return (
        leak
        or _difference("loss", losses, alone.detach(), dtype)
        or _difference("gradient", gradient, _sketch(sample.model), dtype)
    )


@torch.no_grad()
def _find_leak(sample: _Sample, attention: AttentionFunction) -> str | None:
    """Return the losses that depend on a later token or on another document, in words; None: none does. Collective."""
    num_tokens, (_, second) = sample.num_tokens, sample.documents
    before = sample.gathered(sample.losses(sample.tokens, sample.mine, attention))
    found = None
    # One token late in each document is changed: no loss before it may change, and its own loss must.
    for changed, start, stop in (
        (second - second // 4, 0, second),
        (num_tokens - second // 4, second, num_tokens),
    ):
        other = sample.tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % VOCABULARY
        after = sample.gathered(sample.losses(other, sample.mine, attention))
        # Bits are compared, since a leak through one small weight is far below TOLERANCE. It is assumed that equal
        # inputs give equal bits: no kernel of the forward adds atomically, shares merge in the plan's order, matmuls
        # are on one stream, for which cuBLAS promises it, and NCCL sums tensor-parallel parts of one size in one order.
        moved = (after != before).nonzero().flatten().tolist()
        # Position p predicts token p + 1: the loss at changed - 1 has another target.
        leaked = [position for position in moved if not changed - 1 <= position < stop]
        if not found and (leaked or changed not in moved):
            found = (
                f"attention leaks: token {changed} of document [{start}, {stop}) was changed, and the losses at "
                f"{moved[:8]} changed, not only those from {changed - 1} to {stop - 1}"
            )
    return found


def _difference(name: str, got: Tensor, expected: Tensor, dtype: torch.dtype) -> str | None:
    """Return the relative difference of two results in words; None: it is small enough."""
    difference = float((got - expected).norm() / expected.norm())
    if difference <= TOLERANCE[dtype]:
        return None
    return (
        f"the {name} of a small sequence differs from that of one rank by {difference:.2g} of its norm, more than "
        f"{TOLERANCE[dtype]:g} in {dtype}"
    )


def _sketch(model: nn.Module) -> Tensor:
    """Return sums of the gradient's elements with random signs, fp32 [SKETCH], equally drawn on every rank.

    The sketch of a sum is the sum of the sketches, and its norm estimates that of the gradient within some percent
    (Alon, Matias and Szegedy, 1996): ranks exchange 4 KB for a gradient of any size.
    """
    gradient = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
    # The signs repeat after a prime number of elements, so that those of one sum differ whatever the width of a weight.
    signs = torch.randint(2, (SIGNS,), generator=torch.Generator().manual_seed(2)) * 2 - 1
    signed = gradient * signs.to(gradient).repeat(math.ceil(len(gradient) / SIGNS))[: len(gradient)]
    return F.pad(signed, (0, -len(signed) % SKETCH)).view(-1, SKETCH).sum(0)  # [elements / SKETCH, SKETCH]
