"""Layouts of packed documents by work: which rank holds which tokens of which document.

Objective: every rank holds the tokens that zigzag would give it, and as much work (visible pairs) as the mean; then as
few ranks as possible take part in each document, because a rank that holds late tokens of a document needs all of its
earlier keys.

A document of n tokens is cut from both ends inwards: a *slice* has tokens at the front of what is left and at its end,
in the proportion that gives its tokens the mean work of the whole document's. Under full attention that is half of the
slice: the k-th token from the front sees k keys and the k-th from the end n + 1 - k. So a document is a
quantity of n tokens of equal density, wherever it is cut.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from heapq import heappop, heappush
from itertools import accumulate, pairwise
from math import exp
from statistics import NormalDist

from .grid import Layout
from .layout import joined, zigzag

GOLDEN = (5**0.5 - 1) / 2
Runs = tuple[tuple[int, int], ...]
"""Half-open intervals of positions, in ascending order."""


Windows = tuple[tuple[int | None, int], ...]
"""Attention windows of a model's layers in tokens, None for full attention, each with its number of layers."""
FULL: Windows = ((None, 1),)
"""Full attention in all layers."""


class _Document:
    """Tokens of a document that no rank has taken yet."""

    __slots__ = ("_begin", "_windows", "density", "num_tokens", "start", "stop")

    def __init__(self, start: int, stop: int, density: float, windows: Windows | None) -> None:
        self.start, self.stop = start, stop
        self.num_tokens = stop - start
        """Tokens of the whole document."""
        self.density = density
        """Visible pairs of a token in all layers, in the mean."""
        self._begin = start
        self._windows = windows
        """None: no attention window is shorter than the document."""

    def take(self, num_tokens: int) -> Runs:
        """Return the runs of a slice; one may be empty."""
        if num_tokens == self.stop - self.start:
            start, self.start = self.start, self.stop
            return ((start, self.stop),)
        # Without an attention window it is half of the slice; an odd token is taken at the end.
        late = num_tokens - num_tokens // 2 if self._windows is None else self._late_tokens(num_tokens, self._windows)
        taken = (self.start, self.start + num_tokens - late), (self.stop - late, self.stop)
        self.start, self.stop = taken[0][1], taken[1][0]
        return taken

    def _late_tokens(self, num_tokens: int, windows: Windows) -> int:
        """Return how many tokens of a slice are at the end of what is left: no token has less work than one before."""
        first, last = self.start - self._begin, self.stop - self._begin  # what is left, within the document
        # Terms of `excess` that do not depend on `late`.
        both = _num_pairs(last, windows) - _num_pairs(first, windows) - self.density * num_tokens

        def excess(late: int) -> float:
            """Return the work of a slice beyond its share."""
            return both + _num_pairs(first + num_tokens - late, windows) - _num_pairs(last - late, windows)

        return _root(excess, num_tokens, self.density / 2)  # within half the work of a token


def divided(
    layout: Layout, num_tokens: int, document_starts: Sequence[int], size: int, windows: Windows = FULL
) -> list[Runs]:
    """Return the runs of each of `size` ranks under a named layout; one document is always in zigzag.

    Raises ValueError as `zigzag` does.
    """
    if layout == "zigzag" or len(document_starts) == 1:
        return list(_zigzag(num_tokens, size))
    by_work = balanced if layout == "balanced" else whole_documents
    return by_work(num_tokens, document_starts, size, windows)


def balanced(num_tokens: int, document_starts: Sequence[int], size: int, windows: Windows = FULL) -> list[Runs]:
    """Return the runs of each of `size` ranks, with equal work on all of them, up to some tokens.

    All tokens stand in a line, documents in order of density. Rank after rank takes t - x tokens from the light end of
    the line and x from the heavy end. The work of both grows with x, from at most the mean of what is left (x = 0) to
    at least that (x = t), so there is always an x that gives the rank its mean. The heaviest document, which several
    ranks must share, meets the lightest company: each of them holds as much of it as its work allows. A rank cuts two
    documents at most. Raises ValueError as `zigzag` does.
    """
    line = sorted(_documents(num_tokens, document_starts, windows), key=lambda document: document.density)
    # By document: tokens and work of all before it in the line.
    edges = list(accumulate((document.num_tokens for document in line), initial=0))
    works = list(accumulate((document.density * document.num_tokens for document in line), initial=0.0))

    def work(stop: int) -> float:
        """Return the work of the first `stop` tokens of the line."""
        at = bisect_right(edges, stop) - 1
        return works[at] + ((stop - edges[at]) * line[at].density if at < len(line) else 0.0)

    first, last, found = 0, num_tokens, []  # [first, last): the part of the line that is left
    for tokens in _tokens_of_ranks(num_tokens, size):
        left = work(last) - work(first)
        mean = left * tokens / (last - first)
        none = mean - left  # the terms of `excess` without `heavy`, negated

        def excess(heavy: int, light: int = first + tokens, last: int = last, none: float = none) -> float:
            """Return the work of the rank beyond its share, with a number of tokens from the heavy end."""
            return work(light - heavy) - work(last - heavy) - none

        heavy = _root(excess, tokens, mean / tokens / 2)  # within half the work of a token
        runs: list[tuple[int, int]] = []
        for start, stop in ((first, first + tokens - heavy), (last - heavy, last)):
            at = bisect_right(edges, start) - 1  # document of the first token
            while start < stop:
                until = min(stop, edges[at + 1])
                runs += line[at].take(until - start)
                start, at = until, at + 1
        first, last = first + tokens - heavy, last - heavy
        found.append(_joined(runs))
    return found


def typical_packing(num_tokens: int, mean_tokens: int) -> tuple[int, ...]:
    """Return the document starts of a packing of lognormal lengths (sigma 1) with a mean, on which grids are priced.

    Lengths are quantiles of the distribution in a fixed order without trend, so equal arguments give equal packings.
    """
    number = max(1, num_tokens // mean_tokens)
    quantiles = [exp(NormalDist().inv_cdf((n + 0.5) / number)) for n in range(number)]
    # The fractional parts of n x GOLDEN lie evenly for every range of n: lengths that are alike are spread evenly.
    mixed = sorted(range(number), key=lambda n: n * GOLDEN % 1.0)
    ends = list(accumulate(quantiles[n] for n in mixed))
    # A set: a document that is rounded to no token is left out.
    return (0, *sorted({round(num_tokens * end / ends[-1]) for end in ends[:-1]} - {0, num_tokens}))


def whole_documents(num_tokens: int, document_starts: Sequence[int], size: int, windows: Windows = FULL) -> list[Runs]:
    """Return the runs of each of `size` ranks, with every document on one rank if it still fits there.

    Longest documents first, each goes whole to the rank with the least work among those that have room for it, else in
    slices to the ranks with the most room. Raises ValueError as `zigzag` does.
    """
    documents, room = _documents(num_tokens, document_starts, windows), _tokens_of_ranks(num_tokens, size)
    work = [0.0] * size
    taken: list[list[tuple[int, int]]] = [[] for _ in range(size)]
    # Each rank with room is in one heap: by its work if the document may fit there, else by its room.
    by_work: list[tuple[float, int]] = [(0.0, rank) for rank in range(size)]
    by_room: list[tuple[float, int]] = []
    for document in sorted(documents, key=lambda document: -document.num_tokens):
        left = document.num_tokens
        # Documents get shorter: one for which a rank has no room may be followed by one that fits.
        while by_room and -by_room[0][0] >= left:
            rank = heappop(by_room)[1]
            heappush(by_work, (work[rank], rank))
        while by_work and room[by_work[0][1]] < left:
            rank = heappop(by_work)[1]
            heappush(by_room, (-room[rank], rank))
        while left:
            rank = heappop(by_work or by_room)[1]  # least work, or most room
            tokens = min(room[rank], left)
            taken[rank] += document.take(tokens)
            left -= tokens
            room[rank], work[rank] = room[rank] - tokens, work[rank] + tokens * document.density
            if room[rank]:
                heappush(by_work, (work[rank], rank))
    return [_joined(runs) for runs in taken]


def _documents(num_tokens: int, document_starts: Sequence[int], windows: Windows) -> list[_Document]:
    shortest = min((window for window, _ in windows if window is not None), default=num_tokens)
    of_half = sum(num_layers for _, num_layers in windows) / 2  # n tokens have n (n + 1) / 2 pairs a layer
    return [
        _Document(start, stop, of_half * (stop - start + 1), None)
        if stop - start <= shortest
        else _Document(start, stop, _num_pairs(stop - start, windows) / (stop - start), windows)
        for start, stop in pairwise([*document_starts, num_tokens])
    ]


def _num_pairs(num_tokens: int, windows: Windows) -> int:
    """Return the visible pairs of the first tokens of a document, in all layers."""
    total = 0
    for window, num_layers in windows:
        rising = num_tokens if window is None or num_tokens < window else window  # tokens that see all before them
        total += num_layers * (rising * (rising + 1) // 2 + (num_tokens - rising) * rising)
    return total


def _root(excess: Callable[[int], float], stop: int, enough: float) -> int:
    """Return a number of [0, stop] where `excess` is at most `enough` from 0, or the first beyond a change of its sign.

    `excess` rises from at most 0 at 0 to at least 0 at `stop`. By false position; an end that stays twice counts half
    as much (the Illinois algorithm), so that a bend does not hold it up.
    """
    low, high = 0, stop
    below, above = excess(low), excess(high)
    if below >= -enough or above <= enough:
        return low if below >= -enough else high
    moved = 0  # -1: low moved last, 1: high
    # Invariant: excess(low) < -enough and excess(high) > enough.
    while high - low > 1:
        # Strictly between both ends, so that the loop comes to an end.
        at = min(max(low + 1, low + round((high - low) * below / (below - above))), high - 1)
        found = excess(at)
        if abs(found) <= enough:
            return at
        if found < 0:
            low, below, above = at, found, above / 2 if moved < 0 else above
        else:
            high, above, below = at, found, below / 2 if moved > 0 else below
        moved = -1 if found < 0 else 1
    return high


@lru_cache(maxsize=64)
def _zigzag(num_tokens: int, size: int) -> tuple[Runs, ...]:
    return tuple(joined([zigzag(num_tokens, rank, size)]).runs for rank in range(size))


def _tokens_of_ranks(num_tokens: int, size: int) -> list[int]:
    return [sum(stop - start for start, stop in runs) for runs in _zigzag(num_tokens, size)]


def _joined(runs: list[tuple[int, int]]) -> Runs:
    """Return runs in ascending order, touching ones merged and empty ones left out."""
    found: list[tuple[int, int]] = []
    end = -1  # of the last run
    for run in sorted(runs):
        start, stop = run
        if start == end:
            found[-1], end = (found[-1][0], stop), stop
        elif start < stop:
            found.append(run)
            end = stop
    return tuple(found)
