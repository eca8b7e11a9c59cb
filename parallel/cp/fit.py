"""Fit of a fabric to the measured times of a few patterns of messages.

All messages of a pattern have the same size and start at once. So a fabric predicts the time of a pattern from two
numbers: how many messages share the busiest link, and how many latencies the longest path has. `cost` uses the same
rule.

A *site* is a rank, inside a node, or a node with its ranks, across nodes; its ranks are its *ends*.
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
"""Number of sites up to which the pattern "everybody" has all pairs; with more, it has distances 1, 2, 4, ... only."""
UNKNOWN = 1.0
"""Placeholder for bandwidth and latency of a fabric that is not fitted yet."""


class Pattern(NamedTuple):
    """Messages that are sent at once, as (source, target) among the ends of a fabric."""

    name: str
    messages: tuple[tuple[int, int], ...]


class Timing(NamedTuple):
    """Measured seconds of a pattern, with small messages and with large ones."""

    pattern: Pattern
    small_s: float
    large_s: float


@dataclass(frozen=True)
class Fit:
    """A fabric with fitted bandwidth and latency."""

    fabric: Fabric
    error: float
    """Relative error of the predicted times of large messages, root mean square over patterns: 0.05 is 5%."""


def patterns(size: int, width: int = 1) -> list[Pattern]:
    """Return the patterns to time among `size` sites of `width` adjacent ends each, without duplicates.

    End i of a site sends to end i of another. With several ends a site there are two versions of a pattern: the first
    end of each site alone, and all ends at once.
    """
    half = size // 2
    distances = range(1, size) if size <= FEW else [1 << power for power in range((size - 1).bit_length())]
    shifts = {
        "next": [(site, site + 1) for site in range(size)],
        "opposite": [(site, site + half) for site in range(size)],
        "both neighbours": [(site, site + way) for site in range(size) for way in (1, -1)],
        "half to half": [(site, site + half) for site in range(half)],
        "everybody": [(site, site + far) for site in range(size) for far in distances],
        "one pair": [(0, half)],
        "two neighbours, both ways": [(0, 1), (1, 0)],
    }
    # By messages: patterns that are equal under two names are timed once, under the first.
    found: dict[tuple[tuple[int, int], ...], str] = {}
    for name, pairs in shifts.items():
        # Sites count cyclically: the one after the last is site 0.
        pairs = sorted({(source, target % size) for source, target in pairs})
        ends_of = {"one end a site": 1, "all ends": width} if width > 1 else {"": 1}
        if name == "everybody" and width > 1:
            ends_of = {"one end a site": 1}  # all ends would need size x width^2 connections
        for which, ends in ends_of.items():
            messages = tuple((a * width + end, b * width + end) for a, b in pairs for end in range(ends))
            found.setdefault(messages, f"{name}, {which}" if which else name)  # with few sites some patterns are equal
    return [Pattern(name, messages) for messages, name in found.items()]


def fabrics(size: int, width: int = 1) -> list[Fabric]:
    """Return the fabrics that may join `size` sites of `width` ends, commonest first, bandwidth and latency unknown.

    Fabrics that no pattern can distinguish are listed once: three or fewer sites on a ring are a mesh.
    """
    # Ends per port: one, two (GPUs on one PCIe switch), or all ends of a site (one network port for a node).
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
    """Fit bandwidth and latency of each fabric in `kinds`; return the fits by error, equal ones in the given order.

    A large message has `extra_bytes` more than a small one. Errors are differences of logarithms, so that slow and fast
    patterns have equal weight: the fitted bandwidth is the geometric mean over patterns, the latency the median.
    """
    fits = []
    for kind in kinds:
        logs, latencies = [], []
        for pattern, small_s, large_s in timings:
            sharing, latency = _shape(pattern, num_ends, kind)
            # Noise can make the difference small or negative: at least a hundredth of the time is taken for transfer.
            logs.append(math.log(sharing * extra_bytes / max(large_s - small_s, 0.01 * large_s)))
            latencies.append(small_s / latency)
        # The mean minimizes the sum of the squared errors.
        mean = fmean(logs)
        error = math.sqrt(fmean((x - mean) ** 2 for x in logs))
        fitted = replace(kind, bytes_per_s=math.exp(mean), latency_s=median(latencies))
        fits.append(Fit(fitted, math.expm1(error)))
    return sorted(fits, key=lambda found: round(found.error, 6))


def _shape(pattern: Pattern, num_ends: int, kind: Fabric) -> tuple[int, float]:
    """Return the number of messages on the busiest link, and the number of latencies of the longest path."""
    paths = [kind.path(num_ends, source, target) for source, target in pattern.messages]
    on_link = Counter(link for path in paths for link in path.links)
    return max(on_link.values()), max(path.latency_s for path in paths) / kind.latency_s
