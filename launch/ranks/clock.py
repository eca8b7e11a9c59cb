"""A clock that ends a process in which nothing moves, such as one that waits in NCCL for a rank that is gone."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
from dataclasses import dataclass
from typing import Self

from ..errors import GO_ON_LATER, print_error

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """The position of a rank in its command. All ranks pass the same positions in the same order."""

    number: int
    """Number of positions passed before; a smaller number is further behind."""
    step: int
    """Step in progress, from 1; 0 before the first."""
    operation: str
    """Operation in progress, in words."""

    def __str__(self) -> str:
        return f"step {self.step}, {self.operation}" if self.step else self.operation


class Clock:
    """A context that ends this process after `limit_s` seconds without progress; 0 never ends it.

    Time is counted in polls of a thread: while the process is stopped it does not poll, so a stop does not count.
    """

    def __init__(self, rank: int, limit_s: float) -> None:
        self._rank = rank
        self._limit_s = limit_s
        self.position = Position(0, 0, "starting")
        """Current position of this rank."""
        self._beats = 0  # grows with all progress
        self._poll_s = min(5.0, limit_s / 4)  # at least 4 polls within the limit
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="clock", daemon=True)

    def __enter__(self) -> Self:
        if self._limit_s:
            self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._ended.set()
        if self._limit_s:
            self._thread.join()

    def at(self, step: int, operation: str) -> None:
        """Record that this rank begins an operation."""
        self.position = Position(self.position.number + 1, step, operation)
        self._beats += 1

    def alive(self) -> None:
        """Record progress within an operation; may be called from any thread."""
        self._beats += 1  # not atomic: of two threads' beats one may be lost, and the other still shows

    def _watch(self) -> None:
        """Poll for progress until the context is left; after too long without any, end the process."""
        beats, idle_s = self._beats, 0.0
        # `idle_s`: seconds of the polls since the last one that saw a new beat.
        while not self._ended.wait(self._poll_s):
            if beats != self._beats:
                self._moved(idle_s)
                beats, idle_s = self._beats, 0.0
            else:
                idle_s += self._poll_s
                self._idle(idle_s)

    def _moved(self, idle_s: float) -> None:
        """Respond to progress after `idle_s` seconds without any."""

    def _idle(self, idle_s: float) -> None:
        """Respond to `idle_s` seconds without progress; called at every such poll."""
        if idle_s > self._limit_s:
            print_error(f"rank {self._rank}: no progress for {self._limit_s:.0f} s at {self.position}")
            faulthandler.dump_traceback(sys.stderr)
            self._exit()

    def _exit(self) -> None:
        """End this process. Exit handlers would wait for the thread that hangs."""
        os._exit(GO_ON_LATER)
