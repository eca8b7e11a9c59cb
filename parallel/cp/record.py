"""What a rank really did in a pass, in the words in which `cost` tells what it should do."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import TypeVar

import torch

from .cost import Event
from .group import CpGroup
from .plan import Message, RankPlan, Tile
from .transports import Contents, Distributed

T = TypeVar("T")


class Recorded(Distributed):
    """`Distributed`, and writes down when each message was under way and each tile ran, in seconds since `origin_s`.

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
