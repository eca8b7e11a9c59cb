"""Memory that ranks on one machine share through the system, with threads as queues: copies without a GPU.

The memory is an anonymous file and a signal a byte in a pipe, which peers open through /proc. Neither has a name in a
directory, so nothing is left behind however a rank ends. A rank that ends closes its pipes, which tells ranks that wait
for it at once.
"""

from __future__ import annotations

import mmap
import os
import select
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..failures import LostRank
from .copies import Signal, SlotLayout

LOOK_S = 0.2
"""Seconds between two looks of a waiting queue for an error in another queue."""
Operation = tuple[Callable[..., None], tuple[Any, ...]]
"""Function and its arguments."""
Offer = tuple[int, int, dict[Signal, int]]
"""Process id of a rank that lends memory, and its descriptors: the memory, and the far ends of the pipes to it."""


class HostMemory:
    """Memory of some ranks on one machine, as one of them sees it."""

    def __init__(
        self,
        rank: int,
        members: Sequence[int],
        layout: SlotLayout,
        gather: Callable[[Any], list[Any]],
        timeout_s: float,
    ) -> None:
        """Lend memory to all members and open theirs. `gather` returns what each member gives it, in order.

        Collective. Raises OSError on every rank if one of them cannot lend memory, or cannot open what another lends.
        """
        self.rank, self.timeout_s = rank, timeout_s
        self._failure: LostRank | None = None  # of any queue: all of them end with it
        self._full = layout.signals("full")
        self._memory: dict[int, Tensor] = {}
        self._arriving: dict[Signal, int] = {}  # read ends of the pipes to this rank
        self._leaving: dict[Signal, int] = {}  # write ends of the pipes to others
        # The file and the far ends are closed here once all members have opened them. Only a peer then holds the far
        # end of a pipe, so that the pipe ends when that peer does.
        with ExitStack() as lent:
            failed, offer = None, None
            try:
                offer = self._lend(layout, lent)
            except OSError as error:
                failed = f"rank {rank} cannot lend memory: {error}"
            offers = dict(zip(members, gather(offer), strict=True))
            if all(offers.values()):  # None: that rank cannot lend, and says so below
                failed = self._open(offers, layout.num_bytes)
            errors = [error for error in gather(failed) if error]
        # Before the error below, after which the pipes are closed as well.
        weakref.finalize(self, _close, (*self._arriving.values(), *self._leaving.values()))
        if errors:
            raise OSError(errors[0])

    def _lend(self, layout: SlotLayout, lent: ExitStack) -> Offer:
        """Make the memory and the pipes to this rank; `lent` closes the descriptors that only other ranks use."""
        file = os.memfd_create("longring")
        lent.callback(os.close, file)
        os.ftruncate(file, layout.num_bytes)
        far_ends = {}
        for signal in self._full | layout.signals("free"):
            if signal.target == self.rank:
                self._arriving[signal], far_ends[signal] = os.pipe()
                lent.callback(os.close, far_ends[signal])
        return os.getpid(), file, far_ends

    def _open(self, offers: Mapping[int, Offer], num_bytes: int) -> str | None:
        """Open the memory and the pipes of all members; return an error text, or None."""
        for member, (process, file, far_ends) in offers.items():
            try:
                self._memory[member] = _mapped(f"/proc/{process}/fd/{file}", num_bytes)
                for signal in (signal for signal in far_ends if signal.source == self.rank):
                    self._leaving[signal] = os.open(f"/proc/{process}/fd/{far_ends[signal]}", os.O_WRONLY)
            except OSError as error:
                return f"rank {self.rank} cannot open the memory of rank {member}: {error}"
        return None

    def of(self, rank: int) -> Tensor:
        """Return the bytes that a rank lends, uint8 [num_bytes]."""
        return self._memory[rank]

    def queue(self) -> HostQueue:
        """Return a new queue, with a thread of its own."""
        return HostQueue(self)

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a rank. Raises LostRank if it has ended; one that has nothing more to send may end."""
        signal = Signal(self.rank, rank, number)
        try:
            os.write(self._leaving[signal], b"\0")
        except BrokenPipeError:
            if signal in self._full:
                raise self._lost(rank, "has ended") from None

    def wait(self, rank: int, number: int) -> None:
        """Wait for a signal from a rank. Raises LostRank if it has ended or is late, and the error of another queue."""
        end = self._arriving[Signal(rank, self.rank, number)]
        poll = select.poll()
        poll.register(end, select.POLLIN)
        deadline = time.monotonic() + self.timeout_s
        while not poll.poll(1e3 * min(self.timeout_s, LOOK_S)):  # in milliseconds
            if self._failure is not None:
                raise self._failure
            if time.monotonic() > deadline:
                raise self._lost(rank, f"gave no signal for {self.timeout_s:g} s")
        if not os.read(end, 1):  # end of the pipe: nobody can write any more
            raise self._lost(rank, "has ended")

    def _lost(self, rank: int, reason: str) -> LostRank:
        """Return the first loss of a rank, which is this one if there was none."""
        self._failure = self._failure or LostRank(rank, reason)
        return self._failure


class HostQueue:
    """Queue of a thread, which ends with it. After an error it does nothing more, and every later mark raises it."""

    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory
        self._operations: SimpleQueue[Operation | HostDone | None] = SimpleQueue()
        # The thread knows the operations alone, not this object, which therefore ends when its owner drops it.
        threading.Thread(target=_work, args=(self._operations,), name="copies", daemon=True).start()
        weakref.finalize(self, self._operations.put, None)

    def follow(self) -> None:
        """Do nothing: on a CPU, everything that was submitted is computed already."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy bytes. numpy does it in this thread alone, where torch would start others for it."""
        self._operations.put((np.copyto, (target.numpy(), source.numpy())))

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a rank, after all earlier operations of this queue."""
        self._operations.put((self._memory.signal, (rank, number)))

    def wait(self, rank: int, number: int) -> None:
        """Wait for a signal from a rank and consume it, so that it can be sent again."""
        self._operations.put((self._memory.wait, (rank, number)))

    def mark(self) -> HostDone:
        """Return a handle of the end of all operations so far."""
        done = HostDone()
        self._operations.put(done)
        return done


class HostDone:
    """Handle of a point in the queue of a thread, by which a caller waits for all operations before it."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.error: Exception | None = None

    def query(self) -> bool:
        """Return whether the operations are done or one has failed, without waiting for them."""
        return self.reached.is_set()

    def wait(self) -> None:
        """Wait for the operations, each of which has a time limit. Raises the error of the first that failed."""
        self.reached.wait()
        if self.error is not None:
            raise self.error


def _work(operations: SimpleQueue[Operation | HostDone | None]) -> None:
    """Run operations one after the other until there is None."""
    error: Exception | None = None
    while (item := operations.get()) is not None:
        if isinstance(item, HostDone):
            item.error = error
            item.reached.set()
        elif error is None:
            error = _failure(*item)
        # While it waits, the thread holds nothing that others have dropped.
        del item


def _failure(operation: Callable[..., None], arguments: tuple[Any, ...]) -> Exception | None:
    try:
        operation(*arguments)
    except Exception as error:  # whatever it is, the rank that waits for the operation must get it
        return error
    return None


def _close(files: Iterable[int]) -> None:
    for file in files:
        os.close(file)


def _mapped(path: str, num_bytes: int) -> Tensor:
    file = os.open(path, os.O_RDWR)
    try:
        return torch.frombuffer(mmap.mmap(file, num_bytes), dtype=torch.uint8)  # the mapping outlives the descriptor
    finally:
        os.close(file)
