"""What carries messages: process groups between ranks, or copies between ranks that are all in this process."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .cost import Event
from .grid import CpGrid
from .plan import Channel, Flow, Message, RankPlan, Tile

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

    @property
    def size(self) -> int:
        """Number of its members."""
        return len(self.global_ranks)


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
                list(global_ranks), timeout=timedelta(seconds=timeout_s), use_local_synchronization=True
            )
            assert isinstance(group, dist.ProcessGroup)
            channels[flow, direction] = group
    return CpGroup(list(global_ranks).index(dist.get_rank()), tuple(global_ranks), channels, timeout_s)


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
            works = dist.batch_isend_irecv([op for _, op in batch])
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
        try:
            for work in self.works.pop(message):
                work.wait(timedelta(seconds=self.group.timeout_s))
        except RuntimeError as error:
            raise PeerError(self._explain(message)) from error

    def _explain(self, message: Message) -> str:
        if message.source == self.group.rank:
            peer, doing = message.target, "send {} to"
        else:
            peer, doing = message.source, "receive {} from"
        return (
            f"context parallelism: rank {self.group.rank} of {self.group.size} could not "
            f"{doing.format(f'{message.flow} of place {message.owner}')} rank {peer} (posted at step {message.posted}, "
            f"due at step {message.due}) within parallel.cp.timeout_s = {self.group.timeout_s:g}: rank {peer} is dead "
            f"or late; in the whole run it is rank {self.group.global_ranks[peer]}, see its log"
        )


class Recorded(Distributed):
    """The same, and writes down when each message was under way and each tile computed, in seconds since `origin_s`.

    A message is under way from its post until it has been waited for, which is longer than the links carry it. A tile
    runs from the second post of its step to the next wait or post, or the end. On CUDA the compute stream is waited
    for at each of these, so that a measured pass takes a little longer than others.
    """

    def __init__(self, group: CpGroup, plan: RankPlan, *, traded: bool, origin_s: float) -> None:
        super().__init__(group)
        self.events: list[Event] = []
        self._origin_s = origin_s
        # Posts come in order: of traded heads, two for each step, of traded heads.
        self._tiles = [None] * traded + [tile for step in plan.steps for tile in (None, step.tile)] + [None] * traded
        self._posts = 0
        self._running: tuple[Tile, float] | None = None
        self._posted_s: dict[Message, float] = {}

    def post(self, sends: Contents, receives: Contents) -> None:
        """See `Transport`."""
        now = self._now()
        self._posted_s |= dict.fromkeys((*sends, *receives), now)
        super().post(sends, receives)
        tile = self._tiles[self._posts]
        self._posts += 1
        if tile is not None:
            self._running = (tile, self._now())

    def drive(self, work: Generator[Message, None, T]) -> T:
        """Run a pass to its end."""
        result = super().drive(work)
        self._now()
        return result

    def _wait(self, message: Message) -> None:
        self._now()
        super()._wait(message)
        self.events.append(Event(self.group.rank, message, self._posted_s.pop(message), self._now()))

    def _now(self) -> float:
        """Whatever ran until now has ended."""
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        now = time.perf_counter() - self._origin_s
        if self._running is not None:
            tile, started_s = self._running
            self.events.append(Event(self.group.rank, tile, started_s, now))
            self._running = None
        return now


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
