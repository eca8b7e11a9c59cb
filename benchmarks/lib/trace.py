"""Events of a profile: which are messages and which compute, and how long they take together."""

from __future__ import annotations

from collections.abc import Sequence

Interval = tuple[float, float]


def kind_of(name: str, device: str) -> str | None:
    """Return "communication", "compute" or None for an event of the profiler: kernels on CUDA, operators on a CPU."""
    low = name.lower()
    if device == "cpu":
        messages = ("gloo:", "c10d::", "record_param_comms")
        return "communication" if low.startswith(messages) else "compute" if low.startswith("aten::") else None
    if "nccl" in low or "ptop" in low:  # NCCL's kernels, and copies from device to device
        return "communication"
    return None if low.startswith(("memcpy", "memset")) else "compute"


def length(intervals: Sequence[Interval]) -> float:
    """Return the total length of the union of intervals."""
    total, until = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, until))
        until = max(until, stop)
    return total


def covered(messages: Sequence[Interval], compute: Sequence[Interval]) -> float:
    """Return the share, 0 to 1, of the time of messages in which something is computed; 1 without messages."""
    total = length(messages)
    exposed = length([*messages, *compute]) - length(compute)
    return min(1.0, max(0.0, 1 - exposed / total)) if total else 1.0
