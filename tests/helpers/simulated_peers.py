"""Ranks of one machine, simulated in one process: their queues run in any order that their signals allow."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple

import torch
from longring.parallel.cp.copies import Copies, Queue, Signal, SlotLayout
from longring.parallel.cp.group import CpGroup
from longring.parallel.cp.plan import Message
from longring.parallel.cp.transports import Copied
from torch import Tensor

Pass = Generator[Message, None, Any]


class Wait(NamedTuple):
    signal: Signal


class Done:
    reached = False

    def query(self) -> bool:
        return self.reached

    def wait(self) -> None:
        assert self.reached


class SimulatedQueue:
    """Queue whose operations wait until `Machine.drive` runs them."""

    def __init__(self, machine: Machine, rank: int) -> None:
        self.machine, self.rank = machine, rank
        self.operations: list[Wait | Done | Callable[[], object]] = []

    def follow(self) -> None:
        pass

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.operations.append(lambda: target.copy_(source))

    def signal(self, rank: int, number: int) -> None:
        self.operations.append(lambda: self.machine.send(Signal(self.rank, rank, number)))

    def wait(self, rank: int, number: int) -> None:
        self.operations.append(Wait(Signal(rank, self.rank, number)))

    def mark(self) -> Done:
        done = Done()
        self.operations.append(done)
        return done

    def can_run(self) -> bool:
        first = self.operations[0] if self.operations else None
        return first is not None and (not isinstance(first, Wait) or first.signal in self.machine.sent)

    def run(self) -> None:
        first = self.operations.pop(0)
        if isinstance(first, Wait):
            self.machine.sent.remove(first.signal)
        elif isinstance(first, Done):
            first.reached = True
        else:
            first()


class Memory:
    """Memory of all ranks as one of them sees it."""

    def __init__(self, machine: Machine, rank: int) -> None:
        self.machine, self.rank = machine, rank

    def of(self, rank: int) -> Tensor:
        return self.machine.memory[rank]

    def queue(self) -> Queue:
        return self.machine.queue(self.rank)


class Machine:
    """Ranks 0, 1, ... of one machine, and what they have started. `wrap` may change the queues that they get."""

    def __init__(
        self, layout: SlotLayout, size: int, *, one_queue: bool = False, wrap: Callable[[Queue], Queue] = lambda x: x
    ) -> None:
        self.memory = [torch.full((layout.num_bytes,), 0xA5, dtype=torch.uint8) for _ in range(size)]
        self.sent: set[Signal] = set()
        self.queues: list[SimulatedQueue] = []
        self._shared: dict[int, SimulatedQueue] = {}
        self._one_queue, self._wrap = one_queue, wrap
        self.groups = [
            CpGroup(rank, tuple(range(size)), {}, Copies(layout, Memory(self, rank))) for rank in range(size)
        ]

    def send(self, signal: Signal) -> None:
        assert signal not in self.sent, f"{signal} has not been taken"
        self.sent.add(signal)

    def queue(self, rank: int) -> Queue:
        if self._one_queue and rank in self._shared:
            return self._wrap(self._shared[rank])
        self.queues.append(SimulatedQueue(self, rank))
        self._shared[rank] = self.queues[-1]
        return self._wrap(self.queues[-1])

    def transports(self) -> list[Copied]:
        """Return the transport of each rank, for one pass."""
        return [Copied(group, group.copies) for group in self.groups if group.copies is not None]

    def drive(self, passes: list[Pass], transports: list[Copied], choose: Callable[[int], int]) -> list[Any]:
        """Run the passes to their ends, one operation or step of a pass after the other: `choose(n)` picks one of n.

        Raises AssertionError if none can go on, or if something is left at the end.
        """
        results: dict[int, Any] = {}
        wanted: dict[int, Message | None] = dict.fromkeys(range(len(passes)))
        while len(results) < len(passes):
            ready = [rank for rank, message in wanted.items() if _arrived(transports[rank].works, message)]
            queues = [queue for queue in self.queues if queue.can_run()]
            assert ready or queues, f"every rank waits: {wanted}"
            picked = choose(len(ready) + len(queues))
            if picked >= len(ready):
                queues[picked - len(ready)].run()
                continue
            rank = ready[picked]
            message = wanted[rank]
            try:
                if message is not None:
                    transports[rank].wait(message)
                wanted[rank] = next(passes[rank])
            except StopIteration as stop:
                results[rank] = stop.value
                del wanted[rank]
        # What is left are signals that a slot is free, and takes of them by no one.
        while queues := [queue for queue in self.queues if queue.can_run()]:
            queues[choose(len(queues))].run()
        assert not any(queue.operations for queue in self.queues)
        return [results[rank] for rank in range(len(passes))]


def _arrived(works: Mapping[Message, list[Any]], message: Message | None) -> bool:
    return message is None or all(work.reached for work in works[message])
