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

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from math import exp
from statistics import NormalDist

import numpy as np

from .grid import Layout
from .layout import joined, zigzag
from .simulate import Floats
from .visible import FAR, Ints

GOLDEN = (5**0.5 - 1) / 2
Runs = tuple[tuple[int, int], ...]
"""Half-open intervals of positions, in ascending order."""


Windows = tuple[tuple[int | None, int], ...]
"""Attention windows of a model's layers in tokens, None for full attention, each with its number of layers."""
FULL: Windows = ((None, 1),)
"""Full attention in all layers."""


def divided(
    layout: Layout,
    num_tokens: int,
    document_starts: Sequence[int],
    size: int,
    windows: Windows = FULL,
    ranks_per_node: int | None = None,
) -> list[Runs]:
    """Return the runs of each of `size` ranks under a named layout; one document is always in zigzag.

    `ranks_per_node` matters to `documents` only; None: all ranks are on one node. Raises ValueError as `zigzag` does,
    and by a layout by work also for starts that do not ascend from 0 to below `num_tokens`.
    """
    if layout == "zigzag" or len(document_starts) == 1:
        return list(_zigzag(num_tokens, size))
    if layout == "balanced":
        return balanced(num_tokens, document_starts, size, windows)
    return whole_documents(num_tokens, document_starts, size, windows, ranks_per_node)


def balanced(num_tokens: int, document_starts: Sequence[int], size: int, windows: Windows = FULL) -> list[Runs]:
    """Return the runs of each of `size` ranks, with equal work on all of them, up to some tokens.

    All tokens stand in a line, documents in order of density. Rank after rank takes t - x tokens from the light end of
    the line and x from the heavy end. The work of both grows with x, from at most the mean of what is left (x = 0) to
    at least that (x = t), so there is always an x that gives the rank its mean. The heaviest document, which several
    ranks must share, meets the lightest company: each of them holds as much of it as its work allows. A rank cuts two
    documents at most. Raises ValueError as `zigzag` does.
    """
    documents, every = _Documents.of(num_tokens, document_starts, windows), np.arange(len(document_starts))
    return _even(documents, 0 * every, every, documents.tokens, _tokens_of_ranks(num_tokens, size), size)


def whole_documents(
    num_tokens: int,
    document_starts: Sequence[int],
    size: int,
    windows: Windows = FULL,
    ranks_per_node: int | None = None,
) -> list[Runs]:
    """Return the runs of each of `size` ranks, with every document on one node if it still fits there.

    Longest documents first, each goes whole to the node with the least work among those that have room for it, else in
    slices to the nodes with the most room. The ranks of a node divide what it holds as in `balanced`. Within one node
    (None, or `ranks_per_node` of at least `size`) ranks take the part of nodes. Raises ValueError as `zigzag` does.
    """
    from .slices import hand_out  # imported late: numba takes a quarter of a second, and zigzag needs none

    documents, room = _Documents.of(num_tokens, document_starts, windows), _tokens_of_ranks(num_tokens, size)
    group = 1 if ranks_per_node is None or ranks_per_node >= size else ranks_per_node
    longest = np.argsort(-documents.tokens, kind="stable")  # first
    room_of_nodes = np.add.reduceat(room, np.arange(0, size, group))
    node, part, tokens = hand_out(documents.tokens[longest], documents.density[longest], room_of_nodes)
    return _even(documents, node, longest[part], tokens, room, group)


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


@dataclass(frozen=True)
class _Documents:
    """The documents of a packing, as arrays `[documents]`."""

    start: Ints
    stop: Ints
    density: Floats
    """Mean number of visible pairs of a token, summed over all layers."""
    windows: Ints
    """Attention windows, `FAR` for full attention, `[kinds of layers]`."""
    layers: Ints
    """Number of layers of each window."""

    @classmethod
    def of(cls, num_tokens: int, document_starts: Sequence[int], windows: Windows) -> _Documents:
        """Return the documents that begin at these positions. Raises ValueError if they do not ascend from 0."""
        edges, layers = np.array([*document_starts, num_tokens]), np.array([number for _, number in windows])
        if edges[0] != 0 or (np.diff(edges) <= 0).any():  # compiled loops would read beyond their arrays
            shown = f"{tuple(document_starts[:8])}{'...' * (len(document_starts) > 8)}"
            raise ValueError(
                f"document_starts = {shown}: must ascend strictly from 0 to below num_tokens = {num_tokens}; sort "
                "them, each once, with 0"
            )
        reach = np.array([FAR if window is None else window for window, _ in windows])
        tokens = np.diff(edges)[:, None]
        rising = np.minimum(tokens, reach)  # tokens that see all before them, [documents, kinds of layers]
        pairs = rising * (rising + 1) // 2 + (tokens - rising) * rising
        return cls(edges[:-1], edges[1:], (pairs * layers / tokens).sum(1), reach, layers)

    @property
    def tokens(self) -> Ints:
        """Number of tokens of each document."""
        return self.stop - self.start


def _even(documents: _Documents, node: Ints, document: Ints, tokens: Ints, room: Ints, group: int) -> list[Runs]:
    """Return the runs of each rank, where `group` adjacent ranks, a node, divide what it holds of documents evenly.

    `node`, `document` and `tokens` are columns `[n]`; `room` has the tokens of each rank.
    """
    from .slices import cut, even_out  # imported late, as in `whole_documents`

    order = np.lexsort((documents.density[document], node))
    document, tokens = document[order], tokens[order]
    firsts = np.arange(0, len(room) + group, group).clip(max=len(room))  # first rank of each node, and the end
    first_part = np.searchsorted(node[order], np.arange(len(firsts)))
    rank, part, tokens = even_out(tokens, documents.density[document], first_part, room, firsts)
    of = documents.start, documents.stop, documents.density, documents.windows, documents.layers
    runs = cut(document[part], tokens, *of).reshape(-1, 2)  # two of each slice
    return _joined(rank.repeat(2), runs[:, 0], runs[:, 1], len(room))


def _joined(rank: Ints, start: Ints, stop: Ints, size: int) -> list[Runs]:
    """Return the runs of each of `size` ranks in ascending order, touching ones merged and empty ones left out."""
    order = np.lexsort((start, rank))
    rank, start, stop = (of[order[start[order] < stop[order]]] for of in (rank, start, stop))
    touches = (rank[1:] == rank[:-1]) & (start[1:] == stop[:-1])
    rank, start, stop = rank[np.r_[True, ~touches]], start[np.r_[True, ~touches]], stop[np.r_[~touches, True]]
    runs = list(zip(start.tolist(), stop.tolist(), strict=True))
    edges = np.searchsorted(rank, np.arange(size + 1)).tolist()
    return [tuple(runs[first:last]) for first, last in pairwise(edges)]


@lru_cache(maxsize=64)
def _zigzag(num_tokens: int, size: int) -> tuple[Runs, ...]:
    return tuple(joined([zigzag(num_tokens, rank, size)]).runs for rank in range(size))


@lru_cache(maxsize=64)
def _tokens_of_ranks(num_tokens: int, size: int) -> Ints:
    return np.array([sum(stop - start for start, stop in runs) for runs in _zigzag(num_tokens, size)])
