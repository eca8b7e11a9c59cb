"""Context-parallel groups: the ranks that share a sequence, their channels, and errors that name a dead rank."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread

import torch
import torch.distributed as dist

from .grid import CpGrid
from .plan import Channel, Flow, Message

log = logging.getLogger(__name__)


class PeerError(RuntimeError):
    """Another rank of a context-parallel group is dead or late."""


@dataclass(frozen=True)
class CpGroup:
    """The ranks that share a sequence with this rank. `rank`, and all ranks in plans, count within the group."""

    rank: int
    global_ranks: tuple[int, ...]
    """Global rank of each member, in order."""
    channels: Mapping[Channel, dist.ProcessGroup]
    """A process group for each channel, which has its own NCCL communicator and stream, or its own gloo connections."""
    timeout_s: float
    """Longest wait for a message, in seconds."""
    watch: Watch | None = None
    """Thread that ends the process when a message is overdue; used on CUDA, where the device waits and the host does
    not."""

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.global_ranks)

    def explain(self, message: Message) -> str:
        """Return the error text for an overdue message of this rank: rank, flow, steps and peer."""
        if message.source == self.rank:
            peer, action, way = message.target, "send", "to"
        else:
            peer, action, way = message.source, "receive", "from"
        return (
            f"context parallelism: rank {self.rank} of {self.size} could not {action} {message.flow} of grid position "
            f"{message.owner} {way} rank {peer} (posted at step {message.posted}, due at step {message.due}) within "
            f"parallel.cp.timeout_s = {self.timeout_s:g}: rank {peer} of the group is dead or late; see the log of "
            f"global rank {self.global_ranks[peer]}"
        )


class Watch(Thread):
    """Thread that ends the process when a message for which only the device waits is overdue.

    An exception would not help: the host may be waiting for the device, which waits for the dead rank.
    """

    def __init__(self, timeout_s: float, end: Callable[[int], None] = os._exit) -> None:
        super().__init__(daemon=True, name="context-parallel watch")
        self.timeout_s, self.end = timeout_s, end
        self.expected: deque[tuple[float, Callable[[], bool], Callable[[], str]]] = deque()

    def expect(self, is_done: Callable[[], bool], explain: Callable[[], str]) -> None:
        """Watch a message: `is_done()` must become true within timeout_s from now, else `explain()` is printed."""
        self.expected.append((time.monotonic() + self.timeout_s, is_done, explain))

    def run(self) -> None:
        """Check the oldest message until one is overdue; messages that came later are due later."""
        while True:
            while self.expected and self.expected[0][1]():
                self.expected.popleft()
            if self.expected and time.monotonic() > self.expected[0][0]:
                log.critical(self.expected[0][2]())
                print(f"error: {self.expected[0][2]()}", file=sys.stderr, flush=True)
                return self.end(2)
            time.sleep(min(1.0, self.timeout_s / 10))


def open_group(global_ranks: Sequence[int], grids: Iterable[CpGrid], *, timeout_s: float = 600.0) -> CpGroup:
    """Return the group of `global_ranks`, with all channels that `grids` need. Collective among these ranks."""
    flows: set[Flow] = set()
    for grid in grids:
        flows |= {"to_heads", "from_heads"} if grid.heads > 1 else set()
        flows |= {"queries", "query_results"} if grid.query > 1 else set()
        flows |= {"keys", "key_results"} if grid.kv > 1 else set()
    channels: dict[Channel, dist.ProcessGroup] = {}
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    for flow in sorted(flows):
        for direction in ("up", "down"):
            # Only members take part: with 1,024 ranks each makes the groups of its own sequence, not thousands.
            group = dist.new_group(
                list(global_ranks),
                timeout=timedelta(seconds=timeout_s + 60),  # our own limit comes first and names the message
                use_local_synchronization=True,
                group_desc=f"{flow} {direction}",
            )
            assert isinstance(group, dist.ProcessGroup)
            # NCCL makes the communicator at the first use and waits for all members, but not every member uses every
            # channel: the "down" channel of a ring is used by its last and its first rank only.
            dist.all_reduce(torch.zeros(1, device=device), group=group)
            channels[flow, direction] = group
    # On the CPU a wait has a time limit of its own; on CUDA the host does not wait, so a thread watches.
    watch = None
    if device.type == "cuda":
        watch = Watch(timeout_s)
        watch.start()
    return CpGroup(list(global_ranks).index(dist.get_rank()), tuple(global_ranks), channels, timeout_s, watch)
