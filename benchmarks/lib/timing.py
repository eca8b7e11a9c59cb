"""Times of several members beside each other: they take turns call by call, so that all meet the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

Phase = Callable[[Any], Any]
"""One timed part of a member; it takes the value that the part before it returned."""

CASE_S = 1.0
"""Time for the repeats of one case, unless the least number of rounds takes longer."""
LEAST_ROUNDS = {"cpu": 7, "cuda": 2}
L2_BYTES = 256 * 2**20
"""Bytes written before each timed call, more than any device's L2, so that no call finds its inputs in the cache."""


def warm_up(phases: list[Phase], device: str) -> int | None:
    """Run the phases twice, which compiles them; on CUDA return the second run's peak memory beyond what was held."""
    before = 0
    for number in range(2):
        synchronize(device)
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        if device == "cuda" and number:
            torch.cuda.reset_peak_memory_stats()
        value = None
        for phase in phases:
            value = phase(value)
        synchronize(device)
        del value
    return torch.cuda.max_memory_allocated() - before if device == "cuda" else None


def interleaved_ms(members: dict[str, list[Phase]], device: str, budget_s: float = CASE_S) -> dict[str, list[float]]:
    """Return by member the median ms of each phase and, last, of their sum. Members must be warm."""
    flushed = torch.empty(L2_BYTES if device == "cuda" else 0, dtype=torch.int8, device=device)

    def round_of_all() -> dict[str, list[tuple[Any, Any]]]:
        marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in members}
        for name, phases in members.items():
            value = None
            for phase in phases:
                flushed.zero_()
                start = moment(device)
                value = phase(value)
                marks[name].append((start, moment(device)))
        return marks

    # The first round tells how many rounds the budget allows.
    started = time.perf_counter()
    rounds = [round_of_all()]
    synchronize(device)
    affordable = int(budget_s / (time.perf_counter() - started))
    rounds += [round_of_all() for _ in range(min(30, max(LEAST_ROUNDS[device] - 1, affordable)))]
    synchronize(device)
    found = {}
    for name in members:
        times = [[elapsed_ms(*pair) for pair in marks[name]] for marks in rounds]
        found[name] = [median(phase) for phase in zip(*([*t, sum(t)] for t in times), strict=True)]
    return found


def synchronize(device: str) -> None:
    """Wait until the device has done everything that was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()


def moment(device: str) -> Any:
    """Return a point in time for `elapsed_ms`: seconds on a CPU, a recorded event on CUDA."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed_ms(start: Any, stop: Any) -> float:
    """Return the ms between two moments."""
    return (stop - start) * 1e3 if isinstance(start, float) else start.elapsed_time(stop)
