"""Layouts of a sequence over the ranks of a context-parallel group."""

from __future__ import annotations

from collections.abc import Sequence

from ...kernels.layout import SeqLayout


def zigzag(num_tokens: int, rank: int, size: int) -> SeqLayout:
    """Return the zigzag layout of `rank` among `size` ranks: chunks `rank` and `2 size - 1 - rank` of 2 size.

    The lengths of the chunks differ by at most one token. Pairing an early chunk with a late one gives every rank the
    same number of visible (query, key) pairs under a causal mask. n adjacent ranks, from a multiple of n on, hold
    together the tokens of one rank of size / n. Raises ValueError if `rank` is not in [0, size) or there are fewer
    tokens than chunks.
    """
    if not 0 <= rank < size:
        raise ValueError(
            f"zigzag: rank = {rank}: must be at least 0 and below size = {size}; give the rank's own index"
        )
    if num_tokens < 2 * size:
        raise ValueError(f"zigzag: num_tokens = {num_tokens}: cannot be cut into 2 x {size} chunks; use fewer ranks")
    # First and last edge of the early chunk, then of the late one.
    edges = [chunk * num_tokens // (2 * size) for chunk in (rank, rank + 1, 2 * size - 1 - rank, 2 * size - rank)]
    return SeqLayout(((edges[0], edges[1]), (edges[2], edges[3])))


def contiguous(num_tokens: int, rank: int, size: int) -> SeqLayout:
    """Return the layout of `rank` where each of `size` ranks holds one run of equal length, up to one token.

    Under a causal mask later ranks have more to compute. Raises ValueError if `rank` is not in [0, size) or there are
    fewer tokens than ranks.
    """
    if not 0 <= rank < size:
        raise ValueError(
            f"contiguous: rank = {rank}: must be at least 0 and below size = {size}; give the rank's own index"
        )
    if num_tokens < size:
        raise ValueError(f"contiguous: num_tokens = {num_tokens}: cannot be cut into {size} parts; use fewer ranks")
    return SeqLayout(((rank * num_tokens // size, (rank + 1) * num_tokens // size),))


def joined(layouts: Sequence[SeqLayout]) -> SeqLayout:
    """Return the layout of the tokens of several layouts of one context, in order of position, touching runs merged."""
    runs: list[tuple[int, int]] = []  # merged so far, in order of position
    for start, stop in sorted(run for layout in layouts for run in layout.runs):
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return SeqLayout(tuple(runs), layouts[0].document_starts)


def position_layouts(layouts: Sequence[SeqLayout], heads: int) -> list[SeqLayout]:
    """Return the layout of each grid position, which `heads` ranks hold together, from those of all ranks."""
    return [joined(layouts[first : first + heads]) for first in range(0, len(layouts), heads)]
