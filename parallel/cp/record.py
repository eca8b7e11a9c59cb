"""Recording of a measured pass as the same events that `cost` simulates."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import TypeVar

import torch

from .compiled import CompiledPlan, Compute, Post
from .cost import Event
from .group import CpGroup
from .plan import Message, Tile
from .transports import BetweenProcesses, Contents, between_processes

T = TypeVar("T")


class Recorded(BetweenProcesses):
    """Transport that records the time of each message and each tile in `events`, in seconds since `origin_s`.

    A message counts from its post until it has been waited for, which is longer than the links carry it. A tile counts
    from the post before it to the next wait or post, or to the end of the pass. On CUDA the host synchronizes
    with the compute stream at each of these, so a recorded pass takes a little longer.
    """

    def __init__(self, group: CpGroup, plan: CompiledPlan, *, origin_s: float) -> None:
        super().__init__(group)
        self._carrier = between_processes(group)
        self.events: list[Event] = []
        self._origin_s = origin_s
        # Tile that follows each post; heads are traded by one post before those of the plan and one after.
        traded = [None] * any(plan.trades[flow].sends for flow in ("to_heads", "from_heads"))
        tiles: list[Tile | None] = []
        for operation in plan.operations:
            if isinstance(operation, Post):
                tiles.append(None)
            elif isinstance(operation, Compute):
                tiles[-1] = operation.tile
        self._tiles = [*traded, *tiles, *traded]
        self._posts = 0
        self._running: tuple[Tile, float] | None = None
        self._posted_s: dict[Message, float] = {}

    def post(self, sends: Contents, receives: Contents) -> None:
        """Start messages (see `Transport`) and note the time."""
        now = self._now()
        self._posted_s |= dict.fromkeys((*sends, *receives), now)
        self._carrier.post(sends, receives)
        tile = self._tiles[self._posts]
        self._posts += 1
        if tile is not None:
            self._running = (tile, self._now())

    def drive(self, running: Generator[Message, None, T]) -> T:
        """Run a pass to its end and return its result. Raises PeerError if a rank is gone or does not answer."""
        result = super().drive(running)
        self._now()  # the last tile ends here
        return result

    def wait(self, message: Message) -> None:
        """Let the computation wait for a message, and note the time. Raises PeerError as `drive` does."""
        self._now()  # a tile that was running ends before the wait
        self._carrier.wait(message)
        self.events.append(Event(self.group.rank, message, self._posted_s.pop(message), self._now()))

    def _now(self) -> float:
        """Return the time in seconds since `origin_s`; a tile that was running has ended."""
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        now = time.perf_counter() - self._origin_s
        if self._running is not None:
            tile, started_s = self._running
            self.events.append(Event(self.group.rank, tile, started_s, now))
            self._running = None
        return now
