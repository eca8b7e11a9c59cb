"""Context-parallel groups: the ranks that share a sequence, their channels, and errors that name a dead rank."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.layout import SeqLayout
from .copies import Copies, SlotLayout
from .grid import CpGrid
from .plan import FLOWS, PASSES, Channel, Flow, Link, Message
from .reach import open_copies, sizes_in_reach
from .schedules import Schedule
from .topology import PeerCopies
from .visible import Visibility

log = logging.getLogger(__name__)

BYTES_PER_CTA = (2 << 20, 10 << 20)
"""Estimate of the GPU memory of a link for each CTA of its communicator, of the sender and of the receiver: 64 and 320
MiB for 32 CTAs, as others measured inside a node of 8 H100 (github.com/NVIDIA/nccl/issues/1685)."""


@dataclass(frozen=True)
class CommunicatorOptions:
    """Options of the process groups of context parallelism; `max_ctas` and `high_priority` matter with NCCL only."""

    max_ctas: int = 8
    """Maximum number of thread blocks (CTAs) of one message, a power of two: few leave the GPU to attention, and take
    less memory."""
    high_priority: bool = True
    """Whether messages run on streams of high priority, before waiting thread blocks of attention."""
    timeout: timedelta | None = None
    """Time after which torch ends a message; None: torch's default."""
    peer_copies: PeerCopies = "auto"
    """Rings that take copies instead of communicators."""
    slot_bytes: int = 8 << 20
    """Bytes of a slot of a link that takes copies; a link has two."""

    def nccl_options(self) -> dist.ProcessGroupNCCL.Options:
        """Return these options for one NCCL process group."""
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=self.high_priority)
        options.config.max_ctas = self.max_ctas
        if self.timeout is not None:
            options._timeout = self.timeout
        return options


@dataclass(frozen=True)
class CpGroup:
    """The ranks that share a sequence with this rank. `rank`, and all ranks in plans, count within the group."""

    rank: int
    global_ranks: tuple[int, ...]
    """Global rank of each member, in order."""
    channels: Mapping[Channel, dist.ProcessGroup]
    """A process group for each channel, which has its own NCCL communicator and stream, or its own gloo connections.
    Its ranks are those of the largest group that this one is a part of. With `copies` there may be only one."""
    copies: Copies | None = None
    """Links that carry the messages in place of the channels, if all members reach each other's memory; else None."""

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.global_ranks)

    def add_up(self, x: Tensor) -> None:
        """Add up `x`, of any shape, over the ranks of this group, in place. Collective among all ranks of the channels.

        The message holds a copy of `x` for each group of this size on the channels: `x` should be small.
        """
        channel = next(iter(self.channels.values()))  # any of them serves
        members = dist.get_process_group_ranks(channel)
        of_groups = x.new_zeros(len(members) // self.size, *x.shape)  # each rank fills the row of its group
        own = of_groups[members.index(self.global_ranks[0]) // self.size]
        own.copy_(x)
        dist.all_reduce(of_groups, group=channel)
        x.copy_(own)

    def explain(self, message: Message) -> str:
        """Return the error text for a message of this rank that failed: rank, flow, steps and peer."""
        if message.source == self.rank:
            peer, action, way = message.target, "send", "to"
        else:
            peer, action, way = message.source, "receive", "from"
        return (
            f"context parallelism: rank {self.rank} of {self.size} could not {action} {message.flow} of grid position "
            f"{message.owner} {way} rank {peer} (posted at step {message.posted}, due at step {message.due}): "
            f"rank {peer} of the group is gone or does not answer; see the log of global rank "
            f"{self.global_ranks[peer]}"
        )


def open_rings(
    rings: Mapping[int, Sequence[int]], grids: Iterable[CpGrid], options: CommunicatorOptions | None = None
) -> dict[int, CpGroup]:
    """Return this rank's group for each size of `grids`, all on one set of connected channels.

    `rings` has the global ranks of each group by size, aligned: each is a part of the next larger one. The channels
    reach over the largest, so their number does not grow with the number of sizes. Collective among its ranks.
    """
    grids, options = list(grids), options or CommunicatorOptions()
    sizes = sorted({grid.size for grid in grids})
    ranks = {size: tuple(rings[size]) for size in sizes}
    on_gpu = dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    channels: dict[Channel, dist.ProcessGroup] = {}
    copied: set[int] = set()
    copies = None
    # One process group is always there: by it ranks add up, and learn which ranks reach each other's memory.
    for first in channels_of(grids)[:1]:
        channels[first] = open_channel(ranks[sizes[-1]], " ".join(first), device, options)
        copied, copies = _open_copies(grids, ranks, channels[first], device, options)
    wired = [grid for grid in grids if grid.size not in copied]
    for channel in channels_of(wired):
        if channel not in channels:
            channels[channel] = open_channel(ranks[sizes[-1]], " ".join(channel), device, options)
    rank = dist.get_rank()
    groups = {
        size: CpGroup(ranks[size].index(rank), ranks[size], channels, copies if size in copied else None)
        for size in sizes
    }
    links: set[Link] = set()
    for grid in wired:
        members = rings[grid.size]
        own = links_of(all_links(grid), groups[grid.size].rank)
        links |= {(channel, members[a], members[b]) for channel, a, b in own}
    _connect(channels, links, device)
    gib = link_bytes(links, rank, options.max_ctas) / 2**30
    log.info("%d communicators over %d ranks: about %.2g GiB with NCCL (estimate)", len(channels), sizes[-1], gib)
    return groups


def open_group(
    global_ranks: Sequence[int], grids: Iterable[CpGrid], options: CommunicatorOptions | None = None
) -> CpGroup:
    """Return the group of `global_ranks`, for grids of its size. Collective among these ranks."""
    return open_rings({len(global_ranks): global_ranks}, grids, options)[len(global_ranks)]


def open_channel(
    global_ranks: Sequence[int], name: str, device: torch.device, options: CommunicatorOptions
) -> dist.ProcessGroup:
    """Return a new process group of `global_ranks`, its communicator made. Collective among these ranks."""
    # A world that is bound to a device splits its communicator for each new group, which waits for all of its ranks;
    # here only members take part: with 1,024 ranks each makes the groups of its own sequence, not thousands.
    assert dist.group.WORLD is not None
    assert dist.group.WORLD.bound_device_id is None, "init_process_group(device_id=...) makes new groups wait for ever"
    group = dist.new_group(
        list(global_ranks),
        timeout=options.timeout,
        pg_options=options.nccl_options() if device.type == "cuda" else None,
        use_local_synchronization=True,
        group_desc=name,
    )
    assert isinstance(group, dist.ProcessGroup)
    # NCCL makes the communicator at the first use and waits for all members, but not every member uses every channel:
    # the "down" channel of a ring is used by its last and its first rank only.
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    return group


def channels_of(grids: Iterable[CpGrid]) -> list[Channel]:
    """Return the channels that plans of these grids use, in order."""
    flows: set[Flow] = set()
    for grid in grids:
        flows |= {"to_heads", "from_heads"} if grid.heads > 1 else set()
        flows |= {"queries", "query_results"} if grid.query > 1 else set()
        flows |= {"keys", "key_results"} if grid.kv > 1 else set()
    return [(flow, direction) for flow in sorted(flows) for direction in ("down", "up")]


def all_links(grid: CpGrid) -> set[Link]:
    """Return (channel, source, target) of every message that a plan of the grid may have, whatever is visible."""
    # Without a causal mask every query sees every key: masks, windows and documents only take messages away.
    layouts = [SeqLayout(((at, at + 1),)) for at in range(grid.size)]
    found: set[Link] = set()
    for direction in PASSES:
        messages = Schedule(grid, layouts, Visibility(causal=False), direction).all_messages
        columns = (messages.flow.tolist(), messages.source.tolist(), messages.target.tolist())
        for flow, source, target in set(zip(*columns, strict=True)):
            found.add(((FLOWS[flow], "up" if target > source else "down"), source, target))
    return found


def links_of(links: Iterable[Link], rank: int) -> set[Link]:
    """Return the links that begin or end at a rank."""
    return {link for link in links if rank in link[1:]}


def _open_copies(
    grids: Sequence[CpGrid],
    ranks: Mapping[int, Sequence[int]],
    group: dist.ProcessGroup,
    device: torch.device,
    options: CommunicatorOptions,
) -> tuple[set[int], Copies | None]:
    """Return the sizes of rings that take copies, and the links of this rank. Collective among the largest ring.

    `ranks` has the global ranks of this rank's ring of each size, and `group` those of the largest.
    """
    largest = ranks[max(ranks)]
    copied = sizes_in_reach(sorted(ranks), largest, options.peer_copies, device, group)
    if not copied:
        return copied, None
    members = ranks[max(copied)]
    of_members = group if members == largest else open_channel(members, "copies", device, options)
    layout = slot_layout([grid for grid in grids if grid.size in copied], members, options)
    copies = open_copies(layout, members, of_members, device, options.timeout, high_priority=options.high_priority)
    gib = layout.num_bytes / 2**30
    log.info("copies between the ranks of rings of up to %d: %.2g GiB lent by each rank", max(copied), gib)
    return copied, copies


def slot_layout(grids: Iterable[CpGrid], members: Sequence[int], options: CommunicatorOptions) -> SlotLayout:
    """Return the slots for the links of all rings of these grids among `members`, the same on every rank."""
    links: set[Link] = set()
    for grid in grids:
        within = all_links(grid)
        for ring in (members[at : at + grid.size] for at in range(0, len(members), grid.size)):
            links |= {(channel, ring[source], ring[target]) for channel, source, target in within}
    return SlotLayout(frozenset(links), options.slot_bytes)


def link_bytes(links: Iterable[Link], rank: int, max_ctas: int) -> int:
    """Return an estimate of the bytes of GPU memory that NCCL takes on `rank` for its links.

    Every link counts `max_ctas` times `BYTES_PER_CTA`. The state of a communicator and the connections of its
    collectives are left out.
    """
    return max_ctas * sum(BYTES_PER_CTA[source != rank] for _, source, _ in links)  # [0]: sender


def _connect(channels: Mapping[Channel, dist.ProcessGroup], links: Iterable[Link], device: torch.device) -> None:
    """Send one byte over each link of this rank, between global ranks. Collective.

    NCCL connects a pair of ranks at its first message, and blocks the hosts of both until then: here, where no rank
    computes, and not at the step at which a document first makes two ranks talk.
    """
    # Both ends of a link post it in the round of its channel and distance, and every rank goes through the rounds in
    # increasing order, as in `transports.Distributed.post`. A round is at most one send and one receive.
    rounds: dict[tuple[Channel, int], list[dist.P2POp]] = {}
    for channel, source, target in sorted(links):
        operation, peer = (dist.isend, target) if source == dist.get_rank() else (dist.irecv, source)
        buffer = torch.zeros(1, dtype=torch.uint8, device=device)
        op = dist.P2POp(operation, buffer, peer, channels[channel])
        rounds.setdefault((channel, target - source), []).append(op)
    for work in [work for key in sorted(rounds) for work in dist.batch_isend_irecv(rounds[key])]:
        work.wait()
