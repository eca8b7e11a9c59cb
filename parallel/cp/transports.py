"""What carries messages: process groups between ranks, or copies between ranks that are all in this process."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor

from .grid import CpGrid
from .plan import Channel, Flow, Message

log = logging.getLogger(__name__)
T = TypeVar("T")
Contents = Mapping[Message, list[Tensor]]


class Transport(Protocol):
    """Moves the tensors of messages from their sources to their targets."""

    def post(self, sends: Contents, receives: Contents) -> None:
        """Start these. The tensors are contiguous, and left alone until their message has been waited for."""


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
            channels[flow, direction] = group
    watch = None
    if any(dist.get_backend(group) == "nccl" for group in channels.values()):
        watch = Watch(timeout_s)
        watch.start()
    return CpGroup(list(global_ranks).index(dist.get_rank()), tuple(global_ranks), channels, timeout_s, watch)


class Distributed:
    """Between processes, for one pass of one rank."""

    def __init__(self, group: CpGroup) -> None:
        self.group = group
        self.works: dict[Message, list[dist.Work]] = {}

    def post(self, sends: Contents, receives: Contents) -> None:
        """See `Transport`. Messages of a channel start together, as one batch.

        Receives go first: gloo sends a message when its target has said that it waits, and that word queues behind data
        posted before it (benchmarks/network.py: traffic both ways takes twice the time).
        """
        batches: dict[Channel, list[tuple[Message, dist.P2POp]]] = {}
        for operation, messages in ((dist.irecv, receives), (dist.isend, sends)):
            for message, tensors in messages.items():
                peer = message.target if operation is dist.isend else message.source
                group = self.group.channels[message.channel]
                ops = [(message, dist.P2POp(operation, x, group=group, group_peer=peer)) for x in tensors]
                batches.setdefault(message.channel, []).extend(ops)
        for batch in batches.values():
            try:
                works = dist.batch_isend_irecv([op for _, op in batch])
            except RuntimeError as error:
                # gloo notices here that a peer has ended before, and does not say which of the batch's.
                raise PeerError("; or ".join(dict.fromkeys(self.group.explain(m) for m, _ in batch))) from error
            for at, (message, _) in enumerate(batch):
                # NCCL answers for a batch as a whole, gloo for each tensor.
                work = works[at] if len(works) == len(batch) else works[0]
                self.works.setdefault(message, []).append(work)

    def drive(self, work: Generator[Message, None, T]) -> T:
        """Run a pass to its end."""
        try:
            while True:
                self._wait(next(work))
        except StopIteration as stop:
            return stop.value

    def _wait(self, message: Message) -> None:
        works = self.works.pop(message)
        if self.group.watch is not None:
            # The device waits; a time limit here would make the host wait too.
            for work in works:
                work.wait()
            self.group.watch.expect(
                lambda: all(work.is_completed() for work in works), lambda: self.group.explain(message)
            )
            return
        try:
            for work in works:
                work.wait(timedelta(seconds=self.group.timeout_s))
        except RuntimeError as error:
            raise PeerError(self.group.explain(message)) from error


class InProcess:
    """Between ranks that are all in this process and on one device: a message is a copy."""

    def __init__(self) -> None:
        self.waiting: dict[Message, tuple[bool, list[Tensor]]] = {}
        self.delivered: dict[Message, int] = {}

    def post(self, sends: Contents, receives: Contents) -> None:
        """See `Transport`. The copy is made when both ends have posted."""
        for is_send, messages in ((True, sends), (False, receives)):
            for message, tensors in messages.items():
                other = self.waiting.pop(message, None)
                if other is None:
                    self.waiting[message] = (is_send, tensors)
                    continue
                assert other[0] != is_send, f"both ends of {message} are the same"
                source, target = (tensors, other[1]) if is_send else (other[1], tensors)
                for x, y in zip(source, target, strict=True):
                    assert x.shape == y.shape, f"{message}: {tuple(x.shape)} sent, {tuple(y.shape)} expected"
                    y.copy_(x)
                self.delivered[message] = 2  # both ends will ask

    def drive(self, works: Sequence[Generator[Message, None, T]]) -> list[T]:
        """Run the passes of all ranks to their ends, each as far as it gets before the next has its turn."""
        results: dict[int, T] = {}
        wanted: dict[int, Message | None] = dict.fromkeys(range(len(works)))
        while len(results) < len(works):
            moved = False
            for rank in [rank for rank in wanted if rank not in results]:
                try:
                    while True:
                        message = wanted[rank]
                        if message is not None:
                            if message not in self.delivered:
                                break
                            self.delivered[message] -= 1
                            if not self.delivered[message]:
                                del self.delivered[message]
                        moved = True
                        wanted[rank] = next(works[rank])
                except StopIteration as stop:
                    results[rank] = stop.value
            assert moved, f"every rank waits: {wanted}"
        assert not self.waiting
        assert not self.delivered
        return [results[rank] for rank in range(len(works))]
