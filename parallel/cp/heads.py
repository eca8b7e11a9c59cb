"""The heads axis (Ulysses, arXiv 2309.14509): the ranks of a place trade tokens for heads, and back.

In between, rank s of h holds query heads [s H / h, (s + 1) H / h) of all the place's tokens. Where there are fewer kv
heads than ranks, each kv head goes to all ranks whose query heads it serves, and their gradients for it are summed.
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
    """Which of `num_heads` heads go to a rank, `heads` ranks sharing each place."""
    shard = rank % heads
    first = shard * num_heads // heads
    return slice(first, max(first + 1, (shard + 1) * num_heads // heads))


def tokens_for_heads(
    tensors: list[Tensor], plan: RankPlan, schedule: Schedule, transport: Transport
) -> Generator[Message, None, list[Tensor]]:
    """`[b, s, h, d]` of this rank's tokens and all heads -> of all tokens of its place, in order, and its own heads."""
    heads, layout = schedule.grid.heads, schedule.layouts[plan.place]
    sends, receives = plan.messages("to_heads")
    mine = [x[:, :, heads_of(x.shape[2], plan.rank, heads)] for x in tensors]
    whole = [x.new_empty((x.shape[0], layout.num_tokens, *x.shape[2:])) for x in mine]
    arriving = {m: [_like(x, m) for x in mine] for m in receives}
    leaving = {m: [x[:, :, heads_of(x.shape[2], m.target, heads)].contiguous() for x in tensors] for m in sends}
    transport.post(leaving, arriving)
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
    """The way back, to `num_heads` heads of each tensor; what several ranks hold for one head is summed in fp32."""
    heads, layout = schedule.grid.heads, schedule.layouts[plan.place]
    sends, receives = plan.messages("from_heads")
    leaving = {m: [_tokens(x, layout, schedule.rank_layouts[m.target]) for x in tensors] for m in sends}
    mine = [_tokens(x, layout, schedule.rank_layouts[plan.rank]) for x in tensors]
    arriving = {m: [torch.empty_like(x) for x in mine] for m in receives}
    transport.post(leaving, arriving)
    whole = [
        torch.zeros(
            (x.shape[0], x.shape[1], n, x.shape[3]), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device
        )
        for x, n in zip(mine, num_heads, strict=True)
    ]
    parts_of = {plan.rank: mine}
    for message, parts in arriving.items():
        yield message
        parts_of[message.source] = parts
    for message in leaving:
        yield message
    for rank in sorted(parts_of):
        for total, part in zip(whole, parts_of[rank], strict=True):
            total[:, :, heads_of(total.shape[2], rank, heads)] += part
    return [total.to(x.dtype) for total, x in zip(whole, tensors, strict=True)]


def _like(x: Tensor, message: Message) -> Tensor:
    start, stop = message.rows
    return x.new_empty((x.shape[0], stop - start, *x.shape[2:]))


def _put_tokens(whole: list[Tensor], layout: SeqLayout, parts: list[Tensor], of: SeqLayout) -> None:
    """Copy a rank's tokens to where they lie among those of the place."""
    at = 0
    for start, stop in of.runs:
        first = layout.row_of(start)
        for x, part in zip(whole, parts, strict=True):
            x[:, first : first + stop - start] = part[:, at : at + stop - start]
        at += stop - start


def _tokens(x: Tensor, layout: SeqLayout, of: SeqLayout) -> Tensor:
    """A rank's tokens among those of the place."""
    firsts = [(layout.row_of(start), stop - start) for start, stop in of.runs]
    return torch.cat([x[:, first : first + length] for first, length in firsts], dim=1)
