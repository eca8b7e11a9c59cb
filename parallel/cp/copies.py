"""Copies between the ranks of one machine: messages through memory that a rank lends to its peers, without NCCL.

A link is a channel from one rank to another. Its target lends the source `SLOTS` slots of memory, and a message goes
through them one slot after the other:

    source                                       target
    wait for "free" (not at a slot's first use)
    copy into the slot
    signal "full"                                wait for "full"
                                                 copy out of the slot
                                                 signal "free"

These operations run in queues beside the computation, one for what a channel sends and one for what it receives; the
host only adds to them. A copy has one source and one target, so equal runs stay equal to the last bit.

Every rank adds its messages in one total order (pass, step, half of the step, channel, source, target). The earliest
message that is not finished is therefore at the front of its queues at both ends, and no ranks wait for each other,
even where a device runs all queues of a rank as one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from .plan import Channel, Link

SLOTS = 2
"""Slots of a link: the source fills one while the target empties the other."""
Kind = Literal["full", "free"]


class Done(Protocol):
    """Handle of a point in a queue, by which a caller waits for all operations before it."""

    def query(self) -> bool:
        """Return whether the operations are done, without waiting for them."""
        ...

    def wait(self) -> None:
        """Make the computation wait for them. Raises torch's DistError if a peer is gone or does not answer."""


class Queue(Protocol):
    """Operations that run one after the other, beside the computation; each method adds one and returns at once."""

    def follow(self) -> None:
        """Wait for everything that has been submitted to the computation so far."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy bytes from `source` to `target`, uint8 tensors of one length."""

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a rank, after all earlier operations of this queue."""

    def wait(self, rank: int, number: int) -> None:
        """Wait for a signal from a rank and consume it, so that it can be sent again."""

    def mark(self) -> Done:
        """Return a handle of the end of all operations so far."""
        ...


class PeerMemory(Protocol):
    """Memory that each of some ranks lends to the others, and signals between them."""

    def of(self, rank: int) -> Tensor:
        """Return the bytes that a rank lends, uint8 [num_bytes]."""
        ...

    def queue(self) -> Queue:
        """Return a new queue."""
        ...


class Signal(NamedTuple):
    """Name of a signal, which is sent again only after its target has taken it: one word of memory is enough for it."""

    source: int
    target: int
    number: int


@dataclass(frozen=True)
class SlotLayout:
    """Position of every slot and number of every signal, the same on all ranks. Links are between global ranks."""

    links: frozenset[Link]
    """Links among all ranks, not those of one alone."""
    slot_bytes: int
    """Size of every slot; a longer message takes several in turn."""

    @cached_property
    def _first_slots(self) -> dict[Link, int]:
        count: Counter[int] = Counter()  # links to each target so far
        first = {}
        for link in sorted(self.links):  # sorted: all ranks count alike
            first[link] = SLOTS * count[link[2]]
            count[link[2]] += 1
        return first

    @cached_property
    def _channels(self) -> list[Channel]:
        return sorted({channel for channel, _, _ in self.links})

    @cached_property
    def num_bytes(self) -> int:
        """Bytes that each rank lends: the most that any of them needs."""
        # The last link of a rank has SLOTS slots from its first on.
        return self.slot_bytes * (SLOTS + max(self._first_slots.values()))

    @property
    def num_signals(self) -> int:
        """Number of signals that a rank can get from another one."""
        return 2 * SLOTS * len(self._channels)

    def bytes_of(self, link: Link, slot: int) -> slice:
        """Return the bytes of a slot in the memory of the link's target."""
        start = (self._first_slots[link] + slot) * self.slot_bytes
        return slice(start, start + self.slot_bytes)

    def number(self, channel: Channel, slot: int, kind: Kind) -> int:
        """Return the number of the signal that a slot is full, to its target, or free, to its source."""
        return 2 * (SLOTS * self._channels.index(channel) + slot) + (kind == "free")

    def signals(self, kind: Kind) -> set[Signal]:
        """Return all signals of a kind."""
        return {
            # "full" goes the way of the message, "free" the way back.
            Signal(*((source, target) if kind == "full" else (target, source)), self.number(channel, slot, kind))
            for channel, source, target in self.links
            for slot in range(SLOTS)
        }


class Copies:
    """Links of one rank to and from its peers; lives as long as the run, since it counts the turns of the slots."""

    def __init__(self, layout: SlotLayout, memory: PeerMemory) -> None:
        self.layout, self.memory = layout, memory
        self._used: Counter[Link] = Counter()
        """Number of slots that all messages so far have taken, by link."""
        self._queues: dict[tuple[Channel, bool], Queue] = {}

    def send(self, link: Link, tensors: Sequence[Tensor]) -> Done:
        """Start a message from this rank: contiguous tensors of any shape, which must not change until it is sent."""
        channel, _, target = link
        queue = self._queue(channel, is_send=True)
        for content in contents(tensors, self.layout.slot_bytes):
            slot, used = self._next_slot(link)
            if used:
                queue.wait(target, self.layout.number(channel, slot, "free"))
            lent = self.memory.of(target)[self.layout.bytes_of(link, slot)]
            for at, part in content:
                queue.copy(lent[at : at + len(part)], part)
            queue.signal(target, self.layout.number(channel, slot, "full"))
        return queue.mark()

    def receive(self, link: Link, tensors: Sequence[Tensor]) -> Done:
        """Start a message to this rank, into contiguous tensors of the shapes and dtypes that were sent."""
        channel, source, target = link
        queue = self._queue(channel, is_send=False)
        for content in contents(tensors, self.layout.slot_bytes):
            slot, _ = self._next_slot(link)
            queue.wait(source, self.layout.number(channel, slot, "full"))
            lent = self.memory.of(target)[self.layout.bytes_of(link, slot)]
            for at, part in content:
                queue.copy(part, lent[at : at + len(part)])
            queue.signal(source, self.layout.number(channel, slot, "free"))
        return queue.mark()

    def _next_slot(self, link: Link) -> tuple[int, bool]:
        """Return the next slot of a link, and whether it has been used before."""
        count = self._used[link]
        self._used[link] += 1
        return count % SLOTS, count >= SLOTS

    def _queue(self, channel: Channel, *, is_send: bool) -> Queue:
        """Return the queue of a channel's sends or receives; what is added to it waits for the computation so far."""
        if (channel, is_send) not in self._queues:
            self._queues[channel, is_send] = self.memory.queue()
        queue = self._queues[channel, is_send]
        # The tensors to send may not be computed yet, and computation may still read those that are received into.
        queue.follow()
        return queue


def contents(tensors: Sequence[Tensor], slot_bytes: int) -> Iterator[list[tuple[int, Tensor]]]:
    """Yield the content of each slot in turn, as (offset in the slot, bytes uint8 [n]) of parts of the tensors."""
    content: list[tuple[int, Tensor]] = []
    at = 0  # bytes of the present slot that are taken
    for tensor in tensors:
        left = tensor.detach().view(-1).view(torch.uint8)  # bytes that have no slot yet
        while len(left):
            part, left = left[: slot_bytes - at], left[slot_bytes - at :]
            content.append((at, part))
            at += len(part)
            if at == slot_bytes:
                yield content
                content, at = [], 0
    if content:
        yield content
