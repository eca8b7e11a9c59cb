"""The heads axis (Ulysses, arXiv 2309.14509): the ranks of a grid position trade tokens for heads, and back.

In between, the i-th of n ranks holds query heads [i H / n, (i + 1) H / n) of all tokens of the position. With fewer kv
heads than ranks, each kv head goes to every rank whose query heads use it, and their gradients for it are summed.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from ...kernels.layout import SeqLayout
from .plan import Message, RankPlan
from .schedules import Schedule
from .transports import Transport


def heads_of(num_heads: int, rank: int, heads: int) -> slice:
    """Return the range of `num_heads` heads that `rank` computes, where `heads` ranks hold each grid position."""
    index = rank % heads
    first = index * num_heads // heads
    return slice(first, max(first + 1, (index + 1) * num_heads // heads))  # at least one: kv heads may be fewer


def tokens_for_heads(
    tensors: list[Tensor], plan: RankPlan, schedule: Schedule, transport: Transport
) -> Generator[Message, None, list[Tensor]]:
    """Trade this rank's tokens with all heads for all tokens of its grid position with the rank's heads.

    Each tensor `[b, s, h, d]` -> `[b, s of the position, h / heads, d]`, tokens in order. Collective among the ranks of
    a position; yields each message that must be waited for.
    """
    heads, layout = schedule.grid.heads, schedule.layouts[plan.position]
    sends, receives = plan.messages("to_heads")
    mine = [x[:, :, heads_of(x.shape[2], plan.rank, heads)] for x in tensors]  # [b, s, h / heads, d]
    whole = [x.new_empty((x.shape[0], layout.num_tokens, *x.shape[2:])) for x in mine]
    arriving = {m: [_like(x, m) for x in mine] for m in receives}
    leaving = {m: [x[:, :, heads_of(x.shape[2], m.target, heads)].contiguous() for x in tensors] for m in sends}
    transport.post(leaving, arriving)
    # The own tokens are copied while the messages travel.
    _put_tokens(whole, layout, mine, schedule.rank_layouts[plan.rank])
    for message, parts in arriving.items():
        yield message
        _put_tokens(whole, layout, parts, schedule.rank_layouts[message.source])
    for message in leaving:
        yield message
    return whole


def heads_for_tokens(
    tensors: list[Tensor], num_heads: list[int], plan: RankPlan, schedule: Schedule, transport: Transport
) -> Generator[Message, None, list[Tensor]]:
    """Trade back: all tokens of the position with the rank's heads for the rank's tokens with `num_heads` heads.

    Each tensor `[b, s of the position, h / heads, d]` -> `[b, s, num_heads, d]`, for each its number of heads. Partial
    sums of several ranks for one kv head are added in fp32, in order of rank. Collective among the ranks of a position;
    yields each message that must be waited for.
    """
    heads, layout = schedule.grid.heads, schedule.layouts[plan.position]
    sends, receives = plan.messages("from_heads")
    leaving = {m: [_tokens(x, layout, schedule.rank_layouts[m.target]) for x in tensors] for m in sends}
    mine = [_tokens(x, layout, schedule.rank_layouts[plan.rank]) for x in tensors]  # [b, s, h / heads, d]
    arriving = {m: [torch.empty_like(x) for x in mine] for m in receives}
    transport.post(leaving, arriving)
    whole = [
        torch.zeros(
            (x.shape[0], x.shape[1], n, x.shape[3]), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device
        )
        for x, n in zip(mine, num_heads, strict=True)
    ]
    # By rank of the position: this rank's tokens, with the heads of that rank.
    parts_of = {plan.rank: mine}
    for message, parts in arriving.items():
        yield message
        parts_of[message.source] = parts
    for message in leaving:
        yield message
    # In order of rank, whatever the order of arrival: equal runs are equal to the last bit.
    for rank in sorted(parts_of):
        for total, part in zip(whole, parts_of[rank], strict=True):
            total[:, :, heads_of(total.shape[2], rank, heads)] += part
    return [total.to(x.dtype) for total, x in zip(whole, tensors, strict=True)]


def _like(x: Tensor, message: Message) -> Tensor:
    """Return an empty tensor for the rows of a message, `[b, rows, h, d]`."""
    start, stop = message.rows
    return x.new_empty((x.shape[0], stop - start, *x.shape[2:]))


def _put_tokens(whole: list[Tensor], layout: SeqLayout, parts: list[Tensor], of: SeqLayout) -> None:
    """Copy a rank's tokens (layout `of`) to their rows among the tokens of the position (`layout`)."""
    at = 0
    for start, stop in of.runs:
        first = layout.row_of(start)
        for x, part in zip(whole, parts, strict=True):
            x[:, first : first + stop - start] = part[:, at : at + stop - start]
        at += stop - start


def _tokens(x: Tensor, layout: SeqLayout, of: SeqLayout) -> Tensor:
    """Return a rank's tokens (layout `of`) out of the tokens of the position (`layout`): `[b, s, h, d]`."""
    firsts = [(layout.row_of(start), stop - start) for start, stop in of.runs]
    return torch.cat([x[:, first : first + length] for first, length in firsts], dim=1)
