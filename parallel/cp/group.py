"""The ranks that share a sequence, their channels, and what is said when one of them is dead or late."""

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
    """This rank among the ranks that share a sequence; `rank` and all ranks of plans count within the group."""

    rank: int
    global_ranks: tuple[int, ...]
    """Of its members, in order."""
    channels: Mapping[Channel, dist.ProcessGroup]
    """One process group each: its own NCCL communicator and stream, or its own gloo connections."""
    timeout_s: float
    watch: Watch | None = None
    """On CUDA, where the device waits and the host does not."""

    @property
    def size(self) -> int:
        """Number of its members."""
        return len(self.global_ranks)

    def explain(self, message: Message) -> str:
        """What it means that a message of this rank is overdue."""
        if message.source == self.rank:
            peer, doing = message.target, "send {} to"
        else:
            peer, doing = message.source, "receive {} from"
        return (
            f"context parallelism: rank {self.rank} of {self.size} could not "
            f"{doing.format(f'{message.flow} of place {message.owner}')} rank {peer} (posted at step {message.posted}, "
            f"due at step {message.due}) within parallel.cp.timeout_s = {self.timeout_s:g}: rank {peer} is dead "
            f"or late; in the whole run it is rank {self.global_ranks[peer]}, see its log"
        )


class Watch(Thread):
    """Looks after messages that only the device waits for, and ends the process when one is overdue.

    An exception would not do: the host may be waiting for the device, which waits for a dead rank.
    """

    def __init__(self, timeout_s: float, end: Callable[[int], None] = os._exit) -> None:
        super().__init__(daemon=True, name="context-parallel watch")
        self.timeout_s, self.end = timeout_s, end
        self.expected: deque[tuple[float, Callable[[], bool], Callable[[], str]]] = deque()

    def expect(self, is_done: Callable[[], bool], explain: Callable[[], str]) -> None:
        """From now on `is_done` has timeout_s to become true."""
        self.expected.append((time.monotonic() + self.timeout_s, is_done, explain))

    def run(self) -> None:
        """Look at the oldest now and then; what was posted after it cannot be more overdue."""
        while True:
            while self.expected and self.expected[0][1]():
                self.expected.popleft()
            if self.expected and time.monotonic() > self.expected[0][0]:
                log.critical(self.expected[0][2]())
                print(f"error: {self.expected[0][2]()}", file=sys.stderr, flush=True)
                return self.end(2)
            time.sleep(min(1.0, self.timeout_s / 10))


def open_group(global_ranks: Sequence[int], grids: Iterable[CpGrid], *, timeout_s: float = 600.0) -> CpGroup:
    """The group of these ranks, with the channels that these grids need. Collective among them."""
    flows: set[Flow] = set()
    for grid in grids:
        flows |= {"to_heads", "from_heads"} if grid.heads > 1 else set()
        flows |= {"queries", "query_results"} if grid.query > 1 else set()
        flows |= {"keys", "key_results"} if grid.kv > 1 else set()
    channels: dict[Channel, dist.ProcessGroup] = {}
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    for flow in sorted(flows):
        for direction in ("up", "down"):
            # Only members take part in making a group: at 1,024 ranks each makes a few, not thousands.
            group = dist.new_group(
                list(global_ranks),
                timeout=timedelta(seconds=timeout_s + 60),  # ours ends first, and can name the message
                use_local_synchronization=True,
                group_desc=f"{flow} {direction}",
            )
            assert isinstance(group, dist.ProcessGroup)
            # NCCL makes a communicator of all members at its first use, and few members may use a channel first: of a
            # ring's, "down" is used by its last rank and its first alone, which would wait for the others forever.
            dist.all_reduce(torch.zeros(1, device=device), group=group)
            channels[flow, direction] = group
    watch = None
    if device.type == "cuda":
        watch = Watch(timeout_s)
        watch.start()
    return CpGroup(list(global_ranks).index(dist.get_rank()), tuple(global_ranks), channels, timeout_s, watch)
