"""SIGTERM and SIGUSR1 ask a run to save and leave; it does so at a step's edge, when all ranks have heard of it."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Within it, the stop signals are remembered instead of ending the process. Main thread only."""

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first that came."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
