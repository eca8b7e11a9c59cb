"""Context-parallel groups: the ranks that share a sequence, their channels, and errors that name a dead rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ...kernels.layout import SeqLayout
from .grid import CpGrid
from .plan import Channel, Flow, Message, Pass
from .schedules import Schedule
from .visible import Visibility


@dataclass(frozen=True)
class CpGroup:
    """The ranks that share a sequence with this rank. `rank`, and all ranks in plans, count within the group."""

    rank: int
    global_ranks: tuple[int, ...]
    """Global rank of each member, in order."""
    channels: Mapping[Channel, dist.ProcessGroup]
    """A process group for each channel, which has its own NCCL communicator and stream, or its own gloo connections."""

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.global_ranks)

    def explain(self, message: Message) -> str:
        """Return the error text for a message of this rank that failed: rank, flow, steps and peer."""
        if message.source == self.rank:
            peer, action, way = message.target, "send", "to"
        else:
            peer, action, way = message.source, "receive", "from"
        return (
            f"context parallelism: rank {self.rank} of {self.size} could not {action} {message.flow} of grid position "
            f"{message.owner} {way} rank {peer} (posted at step {message.posted}, due at step {message.due}): "
            f"rank {peer} of the group is dead or late; see the log of global rank {self.global_ranks[peer]}"
        )


def open_group(global_ranks: Sequence[int], grids: Iterable[CpGrid], timeout: timedelta | None = None) -> CpGroup:
    """Return the group of `global_ranks`, with all channels that `grids` need, connected.

    A message that takes longer than `timeout` (None: torch's default) fails. Collective among these ranks.
    """
    grids = list(grids)
    rank = list(global_ranks).index(dist.get_rank())
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    links = sorted({link for grid in grids for link in _links(grid, rank)})
    flows: set[Flow] = set()
    for grid in grids:
        flows |= {"to_heads", "from_heads"} if grid.heads > 1 else set()
        flows |= {"queries", "query_results"} if grid.query > 1 else set()
        flows |= {"keys", "key_results"} if grid.kv > 1 else set()
    channels: dict[Channel, dist.ProcessGroup] = {}
    for flow in sorted(flows):
        for direction in ("up", "down"):
            channels[flow, direction] = open_channel(global_ranks, f"{flow} {direction}", device, timeout)
    group = CpGroup(rank, tuple(global_ranks), channels)
    _connect(group, links, device)
    return group


def open_channel(
    global_ranks: Sequence[int], name: str, device: torch.device, timeout: timedelta | None
) -> dist.ProcessGroup:
    """Return a new process group of `global_ranks`, its communicator made. Collective among these ranks."""
    # A world that is bound to a device splits its communicator for each new group, which waits for all of its ranks;
    # here only members take part: with 1,024 ranks each makes the groups of its own sequence, not thousands.
    assert dist.group.WORLD is not None
    assert dist.group.WORLD.bound_device_id is None, "init_process_group(device_id=...) makes new groups wait for ever"
    group = dist.new_group(list(global_ranks), timeout=timeout, use_local_synchronization=True, group_desc=name)
    assert isinstance(group, dist.ProcessGroup)
    # NCCL makes the communicator at the first use and waits for all members, but not every member uses every channel:
    # the "down" channel of a ring is used by its last and its first rank only.
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    return group


def _links(grid: CpGrid, rank: int) -> set[tuple[Channel, int, int]]:
    """Return (channel, source, target) of every message that a plan of `rank` may have, whatever is visible."""
    # One token a rank, and every query sees every key: masks, windows and documents only take messages away.
    layouts = [SeqLayout(((at, at + 1),)) for at in range(grid.size)]
    passes: tuple[Pass, ...] = ("forward", "backward")
    plans = [Schedule(grid, layouts, Visibility(causal=False), direction).plan(rank) for direction in passes]
    return {
        (message.channel, message.source, message.target)
        for plan in plans
        for step in plan.steps
        for message in (*step.sends, *step.receives)
    }


def _connect(group: CpGroup, links: Iterable[tuple[Channel, int, int]], device: torch.device) -> None:
    """Send one byte over each link of this rank. Collective.

    NCCL connects a pair of ranks at its first message, and blocks the hosts of both until then: here, where no rank
    computes, and not at the step at which a document first makes two ranks talk.
    """
    # Both ends of a link post it in the round of its channel and distance, and every rank goes through the rounds in
    # increasing order, as in `transports.Distributed.post`. A round is at most one send and one receive.
    rounds: dict[tuple[Channel, int], list[dist.P2POp]] = {}
    for channel, source, target in links:
        operation, peer = (dist.isend, target) if source == group.rank else (dist.irecv, source)
        buffer = torch.zeros(1, dtype=torch.uint8, device=device)
        op = dist.P2POp(operation, buffer, group=group.channels[channel], group_peer=peer)
        rounds.setdefault((channel, target - source), []).append(op)
    for work in [work for key in sorted(rounds) for work in dist.batch_isend_irecv(rounds[key])]:
        work.wait()
