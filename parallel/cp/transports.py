"""Transports: messages over process groups, by copies between processes, or between ranks of this process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from typing import Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor

from ..failures import LostRank, PeerError, is_lost_peer
from .copies import Copies
from .group import CpGroup
from .plan import Channel, Message

T = TypeVar("T")
Contents = Mapping[Message, list[Tensor]]


class Transport(Protocol):
    """Interface that `execute` needs: a carrier of the tensors of messages from their sources to their targets."""

    def post(self, sends: Contents, receives: Contents) -> None:
        """Start messages. Their tensors are contiguous and must not change until the message has been waited for."""


class Work(Protocol):
    """Handle of a message that has been started, such as `dist.Work`."""

    def wait(self) -> object:
        """Make the computation wait for the message."""


class BetweenProcesses(ABC):
    """Transport between processes, for one pass of one rank."""

    def __init__(self, group: CpGroup) -> None:
        self.group = group
        self.works: dict[Message, list[Work]] = {}  # started, and not waited for yet

    @abstractmethod
    def post(self, sends: Contents, receives: Contents) -> None:
        """Start messages (see `Transport`)."""

    def wait(self, message: Message) -> None:
        """Let the computation wait for a message. Raises PeerError if a rank is gone or does not answer.

        On a GPU only the device waits, and the watchdog of the run ends a wait that is too long.
        """
        try:
            for work in self.works.pop(message):
                work.wait()
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            raise PeerError(self.group.explain(self._blamed(message, error))) from error

    def _blamed(self, message: Message, error: RuntimeError) -> Message:
        """Return a message to or from the rank that an error names; `message` if it names none."""
        ranks = self.group.global_ranks
        lost = error.rank if isinstance(error, LostRank) else None
        return next((m for m in (message, *self.works) if lost in (ranks[m.source], ranks[m.target])), message)

    def drive(self, running: Generator[Message, None, T]) -> T:
        """Run a pass to its end and return its result. Raises PeerError if a rank is gone or does not answer."""
        try:
            while True:
                self.wait(next(running))
        except StopIteration as stop:
            return stop.value


class Distributed(BetweenProcesses):
    """Transport over process groups."""

    def post(self, sends: Contents, receives: Contents) -> None:
        """Start messages (see `Transport`), those of one channel together as one batch, in order of channels.

        The order holds on every rank: NCCL may block the host in a batch, or the device, until the other ends of its
        messages are in theirs. Both ends of a message post it in the same pass, step, half of the step and channel, and
        every rank goes through these in increasing order, so the ranks of the earliest batch never wait for each other.

        Receives go first: gloo sends a message after its target has said that it is ready, and this notice queues
        behind data posted before it (benchmarks/gloo_links.py: traffic in both directions then takes twice the time).
        Raises PeerError if a peer has ended.
        """
        batches: dict[Channel, list[tuple[Message, dist.P2POp]]] = {}
        for operation, messages in ((dist.irecv, receives), (dist.isend, sends)):
            for message, tensors in messages.items():
                peer = message.target if operation is dist.isend else message.source
                peer, group = self.group.global_ranks[peer], self.group.channels[message.channel]
                ops = [(message, dist.P2POp(operation, x, peer, group)) for x in tensors]
                batches.setdefault(message.channel, []).extend(ops)
        for channel in sorted(batches):
            batch = batches[channel]
            try:
                works = dist.batch_isend_irecv([op for _, op in batch])
            except RuntimeError as error:
                if not is_lost_peer(error):
                    raise
                # gloo raises here if a peer has ended, without naming it: every peer of the batch is explained.
                raise PeerError("; or ".join(dict.fromkeys(self.group.explain(m) for m, _ in batch))) from error
            for at, (message, _) in enumerate(batch):
                # NCCL returns one work for the batch, gloo one for each tensor.
                work = works[at] if len(works) == len(batch) else works[0]
                self.works.setdefault(message, []).append(work)


class Copied(BetweenProcesses):
    """Transport by copies between ranks that reach each other's memory."""

    def __init__(self, group: CpGroup, copies: Copies) -> None:
        super().__init__(group)
        self.copies = copies

    def post(self, sends: Contents, receives: Contents) -> None:
        """Start messages (see `Transport`), in an order that all ranks keep (see `copies`)."""
        ranks = self.group.global_ranks
        for message in sorted((*sends, *receives), key=lambda m: (m.channel, m.source, m.target, m)):
            link = (message.channel, ranks[message.source], ranks[message.target])
            if message.source == self.group.rank:
                self.works[message] = [self.copies.send(link, sends[message])]
            else:
                self.works[message] = [self.copies.receive(link, receives[message])]


def between_processes(group: CpGroup) -> BetweenProcesses:
    """Return the transport of a group, for one pass."""
    return Distributed(group) if group.copies is None else Copied(group, group.copies)


class InProcess:
    """Transport between ranks that all run in this process, on one device: a message is a copy."""

    def __init__(self) -> None:
        self.waiting: dict[Message, tuple[bool, list[Tensor]]] = {}  # posted by one end: whether it sends, tensors
        self.delivered: dict[Message, int] = {}  # number of ends that have not waited for it yet

    def post(self, sends: Contents, receives: Contents) -> None:
        """Start messages (see `Transport`); each is copied when both ends have posted it."""
        for is_send, messages in ((True, sends), (False, receives)):
            for message, tensors in messages.items():
                other = self.waiting.pop(message, None)
                if other is None:
                    self.waiting[message] = (is_send, tensors)
                    continue
                assert other[0] != is_send, f"the same end posted {message} twice"
                source, target = (tensors, other[1]) if is_send else (other[1], tensors)
                for x, y in zip(source, target, strict=True):
                    assert x.shape == y.shape, f"{message}: {tuple(x.shape)} sent, {tuple(y.shape)} expected"
                    y.copy_(x)
                self.delivered[message] = 2  # both ends will wait for it

    def _take(self, message: Message) -> bool:
        """Return whether a message has been delivered to the end that asks; each end takes it once."""
        if message not in self.delivered:
            return False
        self.delivered[message] -= 1
        if not self.delivered[message]:
            del self.delivered[message]
        return True

    def drive(self, passes: Sequence[Generator[Message, None, T]]) -> list[T]:
        """Run the passes of all ranks to their ends and return their results by rank.

        Each pass runs until it waits for a message that has not been delivered; then the next has its turn.
        """
        results: dict[int, T] = {}
        # Message for which each rank waits; None before its first.
        wanted: dict[int, Message | None] = dict.fromkeys(range(len(passes)))
        while len(results) < len(passes):
            moved = False
            for rank in [rank for rank in wanted if rank not in results]:
                try:
                    while (message := wanted[rank]) is None or self._take(message):
                        moved = True
                        wanted[rank] = next(passes[rank])
                except StopIteration as stop:
                    results[rank] = stop.value
            assert moved, f"every rank waits: {wanted}"
        assert not self.waiting
        assert not self.delivered
        return [results[rank] for rank in range(len(passes))]
