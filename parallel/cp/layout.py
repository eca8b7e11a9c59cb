"""Which part of a sequence each rank of a context-parallel group holds."""

from __future__ import annotations

from collections.abc import Sequence

from ...kernels.layout import SeqLayout


def zigzag(num_tokens: int, rank: int, size: int) -> SeqLayout:
    """Layout of `rank` among `size` ranks sharing a sequence of `num_tokens`: chunks `rank` and `2 size - 1 - rank`.

    The sequence is cut into 2 size chunks whose lengths differ by at most a token; pairing an early one with a late
    one gives every rank the same number of visible (query, key) pairs under a causal mask. Ranks next to each other
    hold together what one rank of a smaller group would. Raises ValueError when there are fewer tokens than chunks.
    """
    if not 0 <= rank < size:
        raise ValueError(f"zigzag: rank {rank} is not one of {size}")
    if num_tokens < 2 * size:
        raise ValueError(f"zigzag: {num_tokens} tokens cannot be cut into 2 x {size} chunks")
    edges = [chunk * num_tokens // (2 * size) for chunk in (rank, rank + 1, 2 * size - 1 - rank, 2 * size - rank)]
    return SeqLayout(((edges[0], edges[1]), (edges[2], edges[3])))


def contiguous(num_tokens: int, rank: int, size: int) -> SeqLayout:
    """Layout of `rank` where every rank holds one stretch; under a causal mask the last ones have the most to do."""
    if not 0 <= rank < size <= num_tokens:
        raise ValueError(f"contiguous: rank {rank} of {size} with {num_tokens} tokens")
    return SeqLayout(((rank * num_tokens // size, (rank + 1) * num_tokens // size),))


def joined(layouts: Sequence[SeqLayout]) -> SeqLayout:
    """What several ranks hold together, in order of position. They are of one context."""
    runs: list[tuple[int, int]] = []
    for start, stop in sorted(run for layout in layouts for run in layout.runs):
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return SeqLayout(tuple(runs), layouts[0].document_starts)
