"""The heads axis (Ulysses, arXiv 2309.14509): the ranks of a grid position trade tokens for heads, and back.

In between, the i-th of n ranks holds query heads [i H / n, (i + 1) H / n) of all tokens of the position. With fewer kv
heads than ranks, each kv head goes to every rank whose query heads use it, and their gradients for it are summed.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from .compiled import CompiledPlan
from .plan import Message
from .transports import Transport
from .visible import Rows


def heads_of(num_heads: int, rank: int, heads: int) -> slice:
    """Return the range of `num_heads` heads that `rank` computes, where `heads` ranks hold each grid position."""
    index = rank % heads
    first = index * num_heads // heads
    return slice(first, max(first + 1, (index + 1) * num_heads // heads))  # at least one: kv heads may be fewer


def tokens_for_heads(
    tensors: list[Tensor], plan: CompiledPlan, heads: int, transport: Transport
) -> Generator[Message, None, list[Tensor]]:
    """Trade this rank's tokens with all heads for all tokens of its grid position with the rank's heads.

    Each tensor `[b, s, h, d]` -> `[b, s of the position, h / heads, d]`, tokens in order. Collective among the ranks of
    a position; yields each message that must be waited for.
    """
    trade = plan.trades["to_heads"]
    mine = _heads_for(tensors, plan.rank, heads)  # [b, s, heads of all tensors, d]
    b, _, num_heads, d = mine.shape
    arriving = {m: mine.new_empty((b, m.rows[1] - m.rows[0], num_heads, d)) for m in trade.receives}
    leaving = {m: _heads_for(tensors, m.target, heads) for m in trade.sends}
    transport.post(_as_contents(leaving), _as_contents(arriving))
    part_of = {plan.rank: mine}
    for message, part in arriving.items():
        yield message
        part_of[message.source] = part
    for message in leaving:
        yield message
    whole = torch.cat(_pieces(part_of, plan), dim=1)
    sizes = [x[:, :, heads_of(x.shape[2], plan.rank, heads)].shape[2] for x in tensors]
    return list(whole.split(sizes, dim=2))


def heads_for_tokens(
    tensors: list[Tensor], num_heads: list[int], plan: CompiledPlan, heads: int, transport: Transport
) -> Generator[Message, None, list[Tensor]]:
    """Trade back: all tokens of the position with the rank's heads for the rank's tokens with `num_heads` heads.

    Each tensor `[b, s of the position, h / heads, d]` -> `[b, s, num_heads, d]`, for each its number of heads. Partial
    sums of several ranks for one kv head are added in fp32, in order of rank. Collective among the ranks of a position;
    yields each message that must be waited for.
    """
    trade, dtype = plan.trades["from_heads"], tensors[0].dtype
    together = torch.cat(tensors, dim=2)  # [b, s of the position, heads of all tensors, d]
    leaving = {m: _tokens(together, plan.rows_of[m.target]) for m in trade.sends}
    mine = _tokens(together, plan.rows_of[plan.rank])
    arriving = {m: torch.empty_like(mine) for m in trade.receives}
    transport.post(_as_contents(leaving), _as_contents(arriving))
    b, s, _, d = mine.shape
    wide = torch.promote_types(dtype, torch.float32)
    whole = [mine.new_zeros((b, s, n, d), dtype=wide) for n in num_heads]
    # By rank of the position: this rank's tokens, with the heads of that rank.
    part_of = {plan.rank: mine}
    for message, part in arriving.items():
        yield message
        part_of[message.source] = part
    for message in leaving:
        yield message
    sizes = [x.shape[2] for x in tensors]
    # In order of rank, whatever the order of arrival: equal runs are equal to the last bit.
    for rank in sorted(part_of):
        for total, part in zip(whole, part_of[rank].split(sizes, dim=2), strict=True):
            total[:, :, heads_of(total.shape[2], rank, heads)] += part
    return [total.to(dtype) for total in whole]


def _heads_for(tensors: list[Tensor], rank: int, heads: int) -> Tensor:
    """Return the heads of a rank, those of all tensors together: `[b, s, h, d]` each -> one `[b, s, heads, d]`."""
    return torch.cat([x[:, :, heads_of(x.shape[2], rank, heads)] for x in tensors], dim=2)


def _as_contents(tensors: dict[Message, Tensor]) -> dict[Message, list[Tensor]]:
    return {message: [x] for message, x in tensors.items()}


def _pieces(part_of: dict[int, Tensor], plan: CompiledPlan) -> list[Tensor]:
    """Return the runs of all ranks' tokens, given by rank, in the order of the position's tokens."""
    pieces: dict[int, Tensor] = {}
    for rank, part in part_of.items():
        at = 0
        for start, stop in plan.rows_of[rank]:
            pieces[start] = part.narrow(1, at, stop - start)
            at += stop - start
    return [pieces[start] for start in sorted(pieces)]


def _tokens(x: Tensor, rows: tuple[Rows, ...]) -> Tensor:
    """Return a rank's tokens out of the tokens x `[b, s, h, d]` of the position, in memory of their own."""
    return torch.cat([x.narrow(1, start, stop - start) for start, stop in rows], dim=1)
