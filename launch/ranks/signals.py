"""Stop signals: SIGTERM and SIGUSR1 ask a run to save and stop, after the step in which all ranks learn of them."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """A context in which stop signals are recorded instead of ending the process. Main thread only."""

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first stop signal received, or None."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
