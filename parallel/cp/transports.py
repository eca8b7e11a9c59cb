"""What carries messages: process groups between ranks, or copies between ranks that are all in this process."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor

from .grid import CpGrid
from .plan import Channel, Flow, Message

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
