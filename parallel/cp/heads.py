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
from .rows import num_rows
from .transports import Transport


def tokens_for_heads(
    tensors: list[Tensor], plan: CompiledPlan, heads: int, transport: Transport
) -> Generator[Message, None, list[Tensor]]:
    """Trade this rank's tokens with all heads for all tokens of its grid position with the rank's heads.

    Each tensor `[b, s, h, d]` -> `[b, s of the position, h / heads, d]`, tokens in order. Collective among the ranks of
    a position; yields each message that must be waited for.
    """
    trade = plan.trades["to_heads"]
    b, s, _, d = tensors[0].shape
    counts = [max(1, x.shape[2] // heads) for x in tensors]
    mine = tensors[0].new_empty((heads, b, s, sum(counts), d))  # by rank of the position: its heads of all tensors
    for x, of_x, count in zip(tensors, mine.split(counts, dim=3), counts, strict=True):
        # With fewer heads than ranks, each head goes to heads / h ranks: [heads, ...] -> [h, ranks of one head, ...].
        distinct = x.shape[2] // count
        by_head = x.view(b, s, distinct, count, d).permute(2, 0, 1, 3, 4)
        of_x.view(distinct, -1, b, s, count, d).copy_(by_head.unsqueeze(1))
    part_of = dict(zip(plan.runs_of, mine.unbind(), strict=True))  # the own part stays, without a message
    leaving = {m: [part_of[m.target]] for m in trade.sends}
    arriving = {m: [mine.new_empty((b, num_rows(m.rows), sum(counts), d))] for m in trade.receives}
    transport.post(leaving, arriving)
    for message, [part] in arriving.items():
        yield message
        part_of[message.source] = part
    for message in leaving:
        yield message
    whole: list[Tensor] = [mine] * len(plan.run_tokens)
    for rank, runs in plan.runs_of.items():
        for run, tokens in zip(runs, part_of[rank].split([plan.run_tokens[run] for run in runs], dim=1), strict=True):
            whole[run] = tokens
    return list(torch.cat(whole, dim=1).split(counts, dim=2))


def heads_for_tokens(
    tensors: list[Tensor], num_heads: list[int], plan: CompiledPlan, heads: int, transport: Transport
) -> Generator[Message, None, list[Tensor]]:
    """Trade back: all tokens of the position with the rank's heads for the rank's tokens with `num_heads` heads.

    Each tensor `[b, s of the position, h / heads, d]` -> `[b, s, num_heads, d]`, for each its number of heads. Partial
    sums of several ranks for one kv head are added in fp32. Collective among the ranks of a position; yields each
    message that must be waited for.
    """
    trade, dtype, counts = plan.trades["from_heads"], tensors[0].dtype, [x.shape[2] for x in tensors]
    together = torch.cat(tensors, dim=2) if len(tensors) > 1 else tensors[0]  # [b, s of the position, sum of counts, d]
    runs = together.split(plan.run_tokens, dim=1)
    # Tokens in the order of the ranks that hold them: the part of each rank is one slice.
    by_rank = torch.cat([runs[run] for of_rank in plan.runs_of.values() for run in of_rank], dim=1)
    num_tokens = [sum(plan.run_tokens[run] for run in of_rank) for of_rank in plan.runs_of.values()]
    part_of = dict(zip(plan.runs_of, by_rank.split(num_tokens, dim=1), strict=True))
    own = part_of[plan.rank]
    theirs = own.new_empty((heads, *own.shape))  # by rank of the position: this rank's tokens with that rank's heads
    slots = dict(zip(plan.runs_of, theirs.unbind(), strict=True))
    leaving = {m: [part_of[m.target].contiguous()] for m in trade.sends}
    arriving = {m: [slots[m.source]] for m in trade.receives}
    transport.post(leaving, arriving)
    slots[plan.rank].copy_(own)
    yield from (*arriving, *leaving)
    b, s, _, d = own.shape
    found = []
    for of_x, num, count in zip(theirs.split(counts, dim=3), num_heads, counts, strict=True):
        by_head = of_x.view(num // count, -1, b, s, count, d)  # [h, ranks of one head, b, s, 1, d] if heads are few
        if by_head.shape[1] > 1:
            by_head = by_head.sum(1, keepdim=True, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)
        found.append(by_head.squeeze(1).permute(1, 2, 0, 3, 4).reshape(b, s, num, d))
    return found
