"""Curves over the steps of a run, in memory that does not depend on their number."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MOST_BINS = 400
"""Maximum number of points of a curve. A figure of the page is about this many pixels wide."""


class Bin(NamedTuple):
    """The values of one name in adjacent steps."""

    number: int
    total: float
    low: float
    high: float


class Curve(NamedTuple):
    """The values of one name by bin, in the order of steps; arrays `[bins]`, without bins that have no value."""

    tokens: NDArray[np.float64]
    """Mean of the tokens trained at the steps of the bin."""
    number: NDArray[np.float64]
    """Number of values in the bin."""
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    def coarser(self, most: int) -> Curve:
        """Return the curve with at most `most` points, each a mean over adjacent ones."""
        size = -(-len(self.tokens) // most)
        if size <= 1:
            return self
        first = np.arange(0, len(self.tokens), size)  # [points], first bin of each
        number = np.add.reduceat(self.number, first)
        tokens, mean = (np.add.reduceat(x * self.number, first) / number for x in (self.tokens, self.mean))
        low, high = np.minimum.reduceat(self.low, first), np.maximum.reduceat(self.high, first)
        return Curve(tokens, number, mean, low, high)


class Curves:
    """Values by name and step, kept as at most `most` bins of adjacent steps.

    All bins have the same number of steps, a power of two, which doubles when there are too many. Steps must ascend.
    """

    def __init__(self, most: int = MOST_BINS) -> None:
        self._most = most
        self._width = 1
        self._bins: dict[int, dict[str, Bin]] = {}
        self._last = -1  # index of the bin that `_open` belongs to
        self._open: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step; `tokens` must be one of them."""
        index = (step - 1) // self._width
        if index != self._last:
            self._close()
            self._last = (step - 1) // self._width  # anew: `_close` may have doubled the width
        for name, value in values.items():
            self._open[name].append(value)

    def names(self) -> list[str]:
        """Return all names that have a value, in the order of their first."""
        self._close()
        return list(dict.fromkeys(name for bins in self._bins.values() for name in bins))

    def curve(self, name: str) -> Curve:
        """Return the curve of a name."""
        self._close()
        found = [(bins["tokens"], bins[name]) for _, bins in sorted(self._bins.items()) if name in bins]
        columns = [(x.total / x.number, y.number, y.total / y.number, y.low, y.high) for x, y in found]
        return Curve(*np.array(columns, dtype=np.float64).reshape(-1, 5).T)  # [5, bins], without bins too

    def tokens_at(self, step: int) -> float:
        """Return about how many tokens were trained at a step; 0 without any step."""
        self._close()
        known = [(index, bins["tokens"]) for index, bins in sorted(self._bins.items())]
        if not known or step <= 0:
            return 0.0
        # Bin i has steps i w + 1 to (i + 1) w.
        middles = [index * self._width + (self._width + 1) / 2 for index, _ in known]
        return float(np.interp(step, [0, *middles], [0, *(tokens.total / tokens.number for _, tokens in known)]))

    def _close(self) -> None:
        """Move the values that were added into their bin, and halve the number of bins if there are too many."""
        if self._open:
            bins = self._bins.setdefault(self._last, {})
            for name, values in self._open.items():
                new = Bin(len(values), sum(values), min(values), max(values))
                # A reader may have closed the bin before its last steps came.
                bins[name] = _joined(bins[name], new) if name in bins else new
            self._open.clear()
        # Ends, since every round halves the largest index, until all steps are in bin 0.
        while len(self._bins) > self._most:
            self._width *= 2
            halved: dict[int, dict[str, Bin]] = {}
            for index, bins in self._bins.items():
                into = halved.setdefault(index // 2, {})
                for name, values in bins.items():
                    into[name] = _joined(into[name], values) if name in into else values
            self._bins = halved
            self._last //= 2  # later steps of this bin still join it


def _joined(first: Bin, second: Bin) -> Bin:
    return Bin(
        first.number + second.number,
        first.total + second.total,
        min(first.low, second.low),
        max(first.high, second.high),
    )
