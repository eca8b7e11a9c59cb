"""Memory of GPUs that ranks of one machine share, through torch's symmetric memory, with streams as queues.

A copy within one process's view of memory, of equal bytes, is a cudaMemcpyAsync: copy engines make it, and no thread
blocks of attention wait for it. A signal and a wait for one are kernels of one warp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor

from .copies import Done, SlotLayout

SIGNAL_BYTES = 4


class DeviceMemory:
    """Memory of some GPUs, as the rank of one of them sees it."""

    def __init__(
        self,
        members: Sequence[int],
        layout: SlotLayout,
        gather: Callable[[Any], list[Any]],
        group: dist.ProcessGroup,
        device: torch.device,
        priority: int,
    ) -> None:
        """Lend memory to all members, which are those of `group`, and open theirs; `gather` is that of `HostMemory`.

        Collective. Raises RuntimeError on every rank if one of them cannot lend memory.
        """
        self.members, self.priority, self.device = list(members), priority, device
        failed = None
        try:
            self._own = _lend(layout.num_bytes, SIGNAL_BYTES * layout.num_signals * len(members), device)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            failed = f"rank {dist.get_rank()} cannot lend memory: {reason}"
        # A rank that has nothing to lend must not be waited for in the rendezvous.
        errors = [error for error in gather(failed) if error]
        if errors:
            raise RuntimeError(errors[0])
        self.handle = symmetric.rendezvous(self._own, group)
        self._memory = [self.handle.get_buffer(at, (layout.num_bytes,), torch.uint8) for at in range(len(self.members))]

    def of(self, rank: int) -> Tensor:
        """Return the bytes that a rank lends, uint8 [num_bytes], as memory of this rank's GPU."""
        return self._memory[self.members.index(rank)]

    def queue(self) -> DeviceQueue:
        """Return a new queue, with a stream of its own."""
        return DeviceQueue(self)


class DeviceQueue:
    """Queue of a stream. A peer that is gone leaves it waiting, until the run's watchdog ends the process."""

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self._stream = torch.cuda.Stream(memory.device, priority=memory.priority)

    def follow(self) -> None:
        """Wait for everything that has been submitted to the computation so far."""
        self._stream.wait_stream(torch.cuda.current_stream())

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy bytes from `source` to `target`, uint8 tensors of one length."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a rank, after all earlier operations of this queue."""
        with torch.cuda.stream(self._stream):
            self._memory.handle.put_signal(self._memory.members.index(rank), number)

    def wait(self, rank: int, number: int) -> None:
        """Wait for a signal from a rank and consume it, so that it can be sent again."""
        with torch.cuda.stream(self._stream):
            self._memory.handle.wait_signal(self._memory.members.index(rank), number)

    def mark(self) -> Done:
        """Return a handle of the end of all operations so far; the computation's stream waits for it, not the host."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return event


def _lend(num_bytes: int, signal_bytes: int, device: torch.device) -> Tensor:
    """Return memory that other ranks can open, which begins with a word for every signal of every rank."""
    # The size holds for memory that is made after this.
    if symmetric.get_signal_pad_size() < signal_bytes:
        symmetric.set_signal_pad_size(signal_bytes)
    return symmetric.empty(num_bytes, dtype=torch.uint8, device=device)
