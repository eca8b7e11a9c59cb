"""Where the time of a step goes on one rank, and its memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

GIB = 2**30


class _Pair(NamedTuple):
    begin: torch.cuda.Event
    end: torch.cuda.Event


class Parts:
    """Durations of the parts of steps on this rank; on a GPU in the order of its own stream, without waiting for it.

    Each part is also a region of this name in the profiler's trace.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._device = device
        self._pairs: list[tuple[str, _Pair]] = []
        self._ms: dict[str, float] = {}

    @contextmanager
    def part(self, name: str, *, on_host: bool = False) -> Iterator[None]:
        """Count the time in this context to a part; `on_host` by the clock of the host, as for reading data."""
        pair = None
        if self._on_gpu and not on_host:
            pair = _Pair(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self._pairs.append((name, pair))
            pair.begin.record()
        began = time.perf_counter()
        with torch.profiler.record_function(name):
            yield
        if pair is not None:
            pair.end.record()
        else:
            self._ms[name] = self._ms.get(name, 0.0) + (time.perf_counter() - began) * 1e3

    def take(self) -> dict[str, float]:
        """Return the durations since the last call in ms. A GPU must have done the work, which is not waited for."""
        for name, pair in self._pairs:
            self._ms[name] = self._ms.get(name, 0.0) + pair.begin.elapsed_time(pair.end)
        taken, self._ms = self._ms, {}
        self._pairs.clear()
        return taken

    def memory(self) -> dict[str, float]:
        """Return the peaks of torch's allocator on this rank since the last call, in GiB; empty without a GPU."""
        if not self._on_gpu:
            return {}
        found = {
            "peak_gib": torch.cuda.max_memory_allocated(self._device) / GIB,
            "reserved_gib": torch.cuda.max_memory_reserved(self._device) / GIB,
        }
        torch.cuda.reset_peak_memory_stats(self._device)
        return found
