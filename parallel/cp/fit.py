"""From times of a few patterns of messages to the fabric that explains them best.

All messages of a pattern weigh the same and begin at once, so a fabric says how long they take in two numbers: how
many of them share the busiest link, and how many latencies the longest way has. `cost` plays plans by the same rule.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import NamedTuple

from .topology import Fabric

FEW = 16
"""Among more ends, everybody does not talk to everybody at once: at distances of 1, 2, 4, ... alone."""
UNKNOWN = 1.0
"""Bandwidth and latency of a fabric before it is fitted."""


class Pattern(NamedTuple):
    """Messages that travel at once, as (source, target) among the ends of a fabric."""

    name: str
    messages: tuple[tuple[int, int], ...]


class Timing(NamedTuple):
    """What a pattern took, with small messages and with large ones."""

    pattern: Pattern
    small_s: float
    large_s: float


@dataclass(frozen=True)
class Fit:
    """A fabric with the bandwidth and latency that suit it best."""

    fabric: Fabric
    error: float
    """How far it is off the measured times of large messages: 0.05 is 5%, as a root mean square over patterns."""


def patterns(size: int, width: int = 1) -> list[Pattern]:
    """What to time among `size` places of `width` neighbouring ends each; end i of a place talks to end i of another.

    With several ends a place (the ranks of a node), first the first end of each place alone, then all ends.
    """
    half = size // 2
    distances = range(1, size) if size <= FEW else [1 << power for power in range((size - 1).bit_length())]
    shifts = {
        "next": [(place, place + 1) for place in range(size)],
        "opposite": [(place, place + half) for place in range(size)],
        "both neighbours": [(place, place + way) for place in range(size) for way in (1, -1)],
        "half to half": [(place, place + half) for place in range(half)],
        "everybody": [(place, place + far) for place in range(size) for far in distances],
        "one pair": [(0, half)],
        "two neighbours, both ways": [(0, 1), (1, 0)],
    }
    found: dict[tuple[tuple[int, int], ...], str] = {}
    for name, pairs in shifts.items():
        pairs = sorted({(source, target % size) for source, target in pairs})
        ends_of = {"one end a place": 1, "all ends": width} if width > 1 else {"": 1}
        if name == "everybody" and width > 1:
            ends_of = {"one end a place": 1}  # all ends would need size x width^2 connections
        for who, ends in ends_of.items():
            messages = tuple((a * width + end, b * width + end) for a, b in pairs for end in range(ends))
            found.setdefault(messages, f"{name}, {who}" if who else name)  # of few places, some patterns are one
    return [Pattern(name, messages) for messages, name in found.items()]


def fabrics(size: int, width: int = 1) -> list[Fabric]:
    """What may join `size` places of `width` ends, the commonest first; of those that no pattern tells apart, one."""
    if width > 1:
        ports = [1, width] if width == 2 or width % 2 else [1, 2, width]
    else:
        ports = [1, 2] if size > 2 and size % 2 == 0 else [1]
    found = [Fabric("switch", UNKNOWN, UNKNOWN, ends_per_port=ends) for ends in ports]
    if width == 1 and size > 2:
        found.append(Fabric("mesh", UNKNOWN, UNKNOWN))
    if width == 1 and size > 3:
        found.append(Fabric("ring", UNKNOWN, UNKNOWN))
    return [replace(fabric, full_duplex=duplex) for duplex in (True, False) for fabric in found]


def fit(timings: Sequence[Timing], num_ends: int, extra_bytes: int, kinds: Sequence[Fabric]) -> list[Fit]:
    """Each kind with its best bandwidth and latency, that with the least error first; of equals the earlier.

    A large message has `extra_bytes` more than a small one. Times are compared by their logarithms, so that a pattern
    that takes long counts no more than a short one, and bandwidth is the mean of what each pattern says.
    """
    fits = []
    for kind in kinds:
        logs, latencies = [], []
        for pattern, small_s, large_s in timings:
            sharing, latency = _shape(pattern, num_ends, kind)
            # Where noise ate the difference, a hundredth of the time is left: a bandwidth that is too high.
            logs.append(math.log(sharing * extra_bytes / max(large_s - small_s, 0.01 * large_s)))
            latencies.append(small_s / latency)
        mean = fmean(logs)
        error = math.sqrt(fmean((x - mean) ** 2 for x in logs))
        fitted = replace(kind, bytes_per_s=math.exp(mean), latency_s=median(latencies))
        fits.append(Fit(fitted, math.expm1(error)))
    return sorted(fits, key=lambda found: round(found.error, 6))


def _shape(pattern: Pattern, num_ends: int, kind: Fabric) -> tuple[int, float]:
    """Messages on the busiest link, and latencies on the longest way."""
    paths = [kind.path(num_ends, source, target) for source, target in pattern.messages]
    on_link = Counter(link for path in paths for link in path.links)
    return max(on_link.values()), max(path.latency_s for path in paths) / kind.latency_s
