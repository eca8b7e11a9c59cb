"""Durations of the parts of a step on one rank, and its memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

GIB = 2**30


class _Pair(NamedTuple):
    part: str
    outer: str | None
    begin: torch.cuda.Event
    end: torch.cuda.Event


class Parts:
    """Durations of the parts of steps on this rank; on a GPU in the order of its own stream, without waiting for it.

    The time of a part within another part counts for the inner one alone. Each part is also a region of this name in
    the profiler's trace.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._device = device
        self._pairs: list[_Pair] = []
        self._ms: dict[str, float] = {}
        self._open: list[str] = []  # parts entered and not yet left, the outermost first

    @contextmanager
    def part(self, name: str, *, on_host: bool = False) -> Iterator[None]:
        """Count the time in this context to a part; `on_host` by the clock of the host, as for reading data."""
        pair, outer = None, self._open[-1] if self._open else None
        if self._on_gpu and not on_host:
            pair = _Pair(name, outer, torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self._pairs.append(pair)
            pair.begin.record()
        began = time.perf_counter()
        self._open.append(name)
        with torch.profiler.record_function(name):
            yield
        self._open.pop()
        if pair is not None:
            pair.end.record()
        else:
            self._count(name, outer, (time.perf_counter() - began) * 1e3)

    def _count(self, part: str, outer: str | None, ms: float) -> None:
        self._ms[part] = self._ms.get(part, 0.0) + ms
        if outer is not None:
            self._ms[outer] = self._ms.get(outer, 0.0) - ms  # `outer` is counted whole, this part included

    @contextmanager
    def messages(self) -> Iterator[None]:
        """Count the waits for messages within this context as a part of its own, `communication`.

        All waits for torch's messages and collectives go through one method, `dist.Work.wait`. On a GPU the
        time is that in which the computing stream waits; a collective that runs in this stream itself does not count.
        """
        wait = dist.Work.wait
        computing = torch.cuda.current_stream() if self._on_gpu else None

        def timed(work: dist.Work, *arguments: Any, **named: Any) -> bool:
            # Where another stream waits, the computing stream goes on.
            if computing is not None and torch.cuda.current_stream() != computing:
                return wait(work, *arguments, **named)
            with self.part("communication"):
                return wait(work, *arguments, **named)

        dist.Work.wait = timed  # type: ignore[assignment]
        try:
            yield
        finally:
            dist.Work.wait = wait

    def take(self) -> dict[str, float]:
        """Return the durations since the last call in ms. The caller has waited until the GPU was done with them."""
        for pair in self._pairs:
            self._count(pair.part, pair.outer, pair.begin.elapsed_time(pair.end))
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
