"""torch's trace of some steps of a run: `train.profile`."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from .config import TrainConfig

log = logging.getLogger(__name__)


class StepProfiler:
    """Profiler of the steps that `train.profile` names, on one rank."""

    def __init__(self, train: TrainConfig, logs: Path, rank: int) -> None:
        self._first, self._last = train.profile_steps if rank in train.profile_ranks else (0, 0)  # 0: no step
        self._file = logs / f"trace-{rank:05d}-steps-{self._first}-{self._last}.json.gz"
        self._running: profile | None = None

    def before(self, step: int) -> None:
        """Begin the trace if this is its first step."""
        if step == self._first and self._running is None:  # it runs if a rewind comes to this step again
            gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._running = profile(activities=[ProfilerActivity.CPU, *gpu])
            self._running.start()

    def after(self, step: int) -> None:
        """End the trace after its last step, and write it; a trace that cannot be written is only logged."""
        if step >= self._last:
            self.close()

    def close(self) -> None:
        """End a trace in progress, and write it."""
        if self._running is None:
            return
        running, self._running = self._running, None
        running.stop()
        try:
            running.export_chrome_trace(str(self._file))
            log.info("saved %s", self._file)
        except (OSError, RuntimeError) as error:
            log.error("%s: the trace cannot be written: %s", self._file, error)
