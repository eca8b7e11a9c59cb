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
    num_bytes: Ints
    links: Ints
    """Links of each message, `[most links of a message, n]`; those that it lacks are link number `num_links`."""
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
    source, target, links = traffic.source, traffic.target, traffic.links
    carried_s = _busy_bytes(traffic, num_links) / traffic.bytes_per_s
    ready, free = np.zeros(num_ranks), np.zeros(num_links + 1)  # free: time at which a link has carried all so far
    begins, arrival = np.zeros((2, len(source)))
    computed = np.zeros(len(tiles.half))
    by_due = np.argsort(traffic.due, kind="stable")
    # Halves without messages and tiles change nothing.
    halves = np.unique(np.concatenate([traffic.posted, traffic.due, tiles.half]))
    parts = (_parts(of, halves) for of in (traffic.due[by_due], traffic.posted, tiles.half))
    for waits, posts, tile in zip(*parts, strict=True):
        if waits.start < waits.stop:
            came = by_due[waits]
            np.maximum.at(ready, source[came], arrival[came])
            np.maximum.at(ready, target[came], arrival[came])
        if posts.start < posts.stop:
            # Both ends must have posted, and the links must be free.
            at = np.maximum(ready[source[posts]], ready[target[posts]])
            for of_message in links:
                at = np.maximum(at, free[of_message[posts]])
            through = at + carried_s[posts]
            for of_message in links:
                np.maximum.at(free, of_message[posts], through)
            free[-1] = 0  # padding must not hold up later messages
            begins[posts], arrival[posts] = at, through + traffic.latency_s[posts]
        if tile.start < tile.stop:
            computed[tile] = ready[tiles.rank[tile]] + tiles.seconds[tile]
            ready[tiles.rank[tile]] = computed[tile]
    return Times(ready, begins, arrival, computed)


def _parts(of: Ints, halves: Ints) -> list[slice]:
    """Return the part of ascending halves that is equal to each of `halves`."""
    first, stop = (np.searchsorted(of, halves, side).tolist() for side in ("left", "right"))
    return [slice(*part) for part in zip(first, stop, strict=True)]


def _busy_bytes(traffic: Traffic, num_links: int) -> Floats:
    """Return for each message the bytes that the busiest of its links carries until it has carried the message."""
    # A link that is shared evenly has carried a message of weight w when it has carried min(w, weight) of every message
    # of that half on it: with these in order of weight, the sum of the lighter ones + w x (number of the others).
    links, weights = traffic.links, np.broadcast_to(traffic.num_bytes, traffic.links.shape).ravel()
    key = (traffic.posted * (num_links + 1) + links).ravel()  # half and link
    order = np.lexsort((weights, key))
    begins = np.flatnonzero(np.diff(key[order], prepend=-1))
    count = np.diff(begins, append=len(key))
    first, weights = begins.repeat(count), weights[order]  # of each sorted entry, the first entry of its link
    before = np.cumsum(weights) - weights
    shared = np.empty(len(key), np.int64)
    shared[order] = before - before[first] + weights * (count.repeat(count) - (np.arange(len(key)) - first))
    shared = np.where(links == num_links, 0, shared.reshape(links.shape))
    return shared.max(axis=0, initial=0).astype(float)


class Wires(NamedTuple):
    """Paths between every two ranks as arrays; a pair has index source x ranks + target."""

    names: list[Hashable]
    """Name of each link."""
    links: Ints
    """Links of each pair, `[most links of a pair, pairs]`, as indices into `names`; padded with len(names)."""
    bytes_per_s: Floats
    """Bandwidth of each pair's links, `[pairs]`."""
    latency_s: Floats
    """Latency of each pair's path, `[pairs]`."""

    def traffic(self, source: Ints, target: Ints, posted: Ints, due: Ints, num_bytes: Ints) -> Traffic:
        """Return messages with the links that they take."""
        pair = source * round(len(self.latency_s) ** 0.5) + target
        paths = self.links[:, pair], self.bytes_per_s[pair], self.latency_s[pair]
        return Traffic(source, target, posted, due, num_bytes, *paths)


@lru_cache(maxsize=8)
def wires_of(topology: Topology, size: int) -> Wires:
    """Return the paths of `size` ranks. Cached: schedules on one topology share them, and 1,024 ranks have 2^20."""
    numbers: dict[Hashable, int] = {}
    found: list[list[int]] = []
    rates, latencies = np.ones(size**2), np.zeros(size**2)
    for pair in range(size**2):
        source, target = divmod(pair, size)
        found.append([])
        if source != target:
            links, rates[pair], latencies[pair] = topology.path(size, source, target)
            found[pair] = [numbers.setdefault(link, len(numbers)) for link in links]
    most = max(map(len, found))
    padded = np.array([links + [len(numbers)] * (most - len(links)) for links in found], np.int64)
    return Wires(list(numbers), padded.T.copy(), rates, latencies)
