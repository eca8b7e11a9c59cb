"""A check before the first step: attention over several ranks equals attention on one rank.

It costs a few passes of a small model over a short sequence. It finds errors that otherwise only raise the loss: a rank
whose positions are off by one chunk still trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..kernels.layout import SeqLayout
from ..model.attention import AttentionFunction
from ..model.transformer import Transformer
from ..parallel.cp.group import CpGroup
from ..parallel.cp.layout import zigzag
from ..parallel.mesh import Mesh, megatron_config
from .config import Recipe

TOKENS_PER_RANK = 26
"""Tokens of the checked sequence on each rank: two chunks of an odd length, so that documents and kernel blocks end
anywhere. Sequence parallelism rounds it up to a multiple of parallel.tensor."""
VOCABULARY = 128
"""Vocabulary size of the small model."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.03}
"""Maximum relative difference of losses and gradients, by dtype. Correct attention differs by 5e-7 and 9e-3, the faults
in tests/launch/test_guards.py by at least 0.06."""
_ADVICE = "try another train.attention_backend or parallel.cp.schedule, and report this error of LongRing"


def check_attention(
    recipe: Recipe,
    mesh: Mesh,
    group: CpGroup,
    spread: Callable[[int], Callable[[SeqLayout], AttentionFunction]],
    whole: Callable[[SeqLayout], AttentionFunction],
) -> None:
    """Raise ValueError, on every rank of the group, unless a small model gives equal results over the group and alone.

    `spread(tokens)` and `whole` return attention for a layout, over the group and on this rank alone. No loss may
    depend on a later token or on another document, and losses and gradients must equal those of one rank. Collective.
    """
    divisor = recipe.parallel.tensor if recipe.parallel.sequence_parallel else 1
    num_tokens = group.size * math.ceil(TOKENS_PER_RANK / divisor) * divisor
    second = num_tokens // 3
    documents = (0, second)
    mine = SeqLayout(zigzag(num_tokens, group.rank, group.size).runs, documents)
    everything = SeqLayout(((0, num_tokens),), documents)
    attention = spread(num_tokens)(mine)

    dtype = getattr(torch, recipe.train.dtype)
    torch.manual_seed(0)
    # The weights are so large that attention is far from uniform at any width; else it would hardly affect the loss.
    num_layers = min(recipe.model.num_layers, recipe.model.full_attention_every)
    config = replace(recipe.model, num_layers=num_layers, init_std=recipe.model.hidden_size**-0.5)
    model = Transformer(config, VOCABULARY, megatron_config(recipe.parallel)).to(mesh.device, dtype)
    tokens = torch.randint(VOCABULARY, (1, num_tokens + 1), generator=torch.Generator().manual_seed(1)).to(mesh.device)

    def losses(tokens: Tensor, layout: SeqLayout, attention: AttentionFunction) -> Tensor:
        at = layout.positions(mesh.device)
        return model(tokens[:, at], tokens[:, at + 1], layout, attention)[0].float()  # [tokens of the layout]

    def gathered(share: Tensor) -> Tensor:
        """Return the losses of all ranks in order of position, shape [num_tokens]. Collective."""
        of_all = torch.zeros(num_tokens, device=mesh.device)
        of_all[mine.positions(mesh.device)] = share.detach()
        dist.all_reduce(of_all, group=_any_group(group))
        return of_all

    with torch.no_grad():
        before = gathered(losses(tokens, mine, attention))
    # One token late in each document is changed: no loss before it may change, and its own loss must.
    for changed, start in ((second - second // 4, 0), (num_tokens - second // 4, second)):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % VOCABULARY
        with torch.no_grad():
            moved = (gathered(losses(other, mine, attention)) != before).nonzero().flatten().tolist()
        stop = second if start == 0 else num_tokens
        # Position p predicts token p + 1: the loss at changed - 1 has another target.
        leaked = [position for position in moved if not changed - 1 <= position < stop]
        if leaked or changed not in moved:
            raise ValueError(
                f"context parallelism over {group.size} ranks: attention leaks: token {changed} of document [{start}, "
                f"{stop}) was changed, and the losses at {moved[:8]} changed, not only those from {changed - 1} to "
                f"{stop - 1}; {_ADVICE}"
            )

    # Losses and gradients over the group against those of one rank that holds the whole sequence.
    share = losses(tokens, mine, attention)
    share.sum().backward()
    gradient = _gradient(model)
    dist.all_reduce(gradient, group=_any_group(group))
    model.zero_grad()
    alone = losses(tokens, everything, whole(everything))
    alone.sum().backward()
    _compare("loss", gathered(share), alone.detach(), dtype, group)
    _compare("gradient", gradient, _gradient(model), dtype, group)


def _compare(name: str, got: Tensor, expected: Tensor, dtype: torch.dtype, group: CpGroup) -> None:
    difference = float((got - expected).norm() / expected.norm())
    if not difference <= TOLERANCE[dtype]:
        raise ValueError(
            f"context parallelism over {group.size} ranks: the {name} of a small sequence differs from that of one "
            f"rank by {difference:.2g} of its norm, more than {TOLERANCE[dtype]:g} in {dtype}; {_ADVICE}"
        )


def _gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def _any_group(group: CpGroup) -> dist.ProcessGroup:
    return next(iter(group.channels.values()))
