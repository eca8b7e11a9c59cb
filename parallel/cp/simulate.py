"""Simulation of ranks that compute tiles and exchange messages, half step by half step.

A rank starts a step when its last tile is computed and the messages that are due have arrived. A message starts when
both ends have posted it and its links have carried all that was posted in earlier halves; messages that are posted in
the same half and use the same link share its bandwidth evenly. This approximates gloo and NCCL with one stream a
channel; `benchmarks/cp_lab_network.py` compares it with measured times.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .topology import Topology
from .visible import Ints

Floats = NDArray[np.float64]


class Traffic(NamedTuple):
    """Messages as columns, each `[n]` but for `links`, in the order of their posts.

    Half 2 x step is that of a step's results, half 2 x step + 1 that of its shares and of its tile.
    """

    source: Ints
    target: Ints
    posted: Ints
    """Half at the start of which both ends post the message."""
    due: Ints
    """Half at the start of which both ends wait for it."""
    num_bytes: Floats
    """0: the message is not sent."""
    links: Ints
    """Links of each message, `[n, most links of a message]`; those that it lacks are link number `num_links`."""
    bytes_per_s: Floats
    """Bandwidth of each of its links."""
    latency_s: Floats


class Tiles(NamedTuple):
    """Tiles as columns, each `[n]`, in the order of their halves; a rank has at most one in a half."""

    half: Ints
    rank: Ints
    seconds: Floats


class Times(NamedTuple):
    """Simulated times, in seconds."""

    ready: Floats
    """Time at which each rank is done, `[ranks]`."""
    posted: Floats
    """Time at which each message starts, `[messages]`."""
    arrival: Floats
    """Time at which each message has arrived, `[messages]`."""
    computed: Floats
    """Time at which each tile is computed, `[tiles]`."""


def simulate(traffic: Traffic, tiles: Tiles, num_ranks: int, num_links: int) -> Times:
    """Return the times at which ranks exchange messages and compute tiles."""
    from .walk_halves import walk_halves  # imported late: numba takes a quarter of a second, and one rank needs none

    sent = np.flatnonzero(traffic.num_bytes > 0)  # numba finds them in twice the time
    return Times(*walk_halves(sent, *traffic, *tiles, num_ranks, num_links))


def least_seconds(traffic: Traffic, tiles: Tiles, bytes_per_s: Floats) -> float:
    """Return a time that `simulate` cannot go below: that of the busiest rank's tiles or of the busiest link's bytes.

    `bytes_per_s` is the bandwidth of each link, `[links]`.
    """
    from .walk_halves import bytes_of_links  # imported late, as in `simulate`

    computes = np.bincount(tiles.rank, tiles.seconds, 1)
    carries = bytes_of_links(traffic.num_bytes, traffic.links, len(bytes_per_s)) / bytes_per_s
    return max(float(computes.max()), float(carries.max(initial=0.0)))


class Wires(NamedTuple):
    """Paths between every two ranks as arrays; a pair has index source x ranks + target."""

    names: list[Hashable]
    """Name of each link."""
    link_bytes_per_s: Floats
    """Bandwidth of each link, `[links]`."""
    links: Ints
    """Links of each pair, `[pairs, most links of a pair]`, as indices into `names`; padded with len(names)."""
    bytes_per_s: Floats
    """Bandwidth of each pair's links, `[pairs]`."""
    latency_s: Floats
    """Latency of each pair's path, `[pairs]`."""

    def traffic(self, source: Ints, target: Ints, posted: Ints, due: Ints, num_bytes: Floats) -> Traffic:
        """Return messages with the links that they take; the arguments are `[n]`."""
        pair = source * round(len(self.latency_s) ** 0.5) + target  # there are ranks^2 pairs
        paths = self.links[pair], self.bytes_per_s[pair], self.latency_s[pair]
        return Traffic(source, target, posted, due, num_bytes, *paths)


@lru_cache(maxsize=8)
def wires_of(topology: Topology, size: int) -> Wires:
    """Return the paths of `size` ranks. Cached: schedules on one topology share them, and 1,024 ranks have 2^20."""
    numbers: dict[Hashable, int] = {}
    found: list[list[int]] = []
    rates, latencies = np.ones(size**2), np.zeros(size**2)  # of a rank with itself: no links
    for pair in range(size**2):
        source, target = divmod(pair, size)
        found.append([])
        if source != target:
            links, rates[pair], latencies[pair] = topology.path(size, source, target)
            found[pair] = [numbers.setdefault(link, len(numbers)) for link in links]
    most = max(map(len, found))
    padded = np.array([links + [len(numbers)] * (most - len(links)) for links in found], np.int64)
    of_links = np.ones(len(numbers) + 1)  # the last one: links that a pair lacks
    of_links[padded] = rates[:, None]
    return Wires(list(numbers), of_links[:-1], padded, rates, latencies)
