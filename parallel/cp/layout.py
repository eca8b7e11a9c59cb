"""Zigzag: which part of a sequence each rank of a context-parallel group holds."""

from __future__ import annotations

from ...kernels.layout import SeqLayout


def zigzag(num_tokens: int, rank: int, size: int) -> SeqLayout:
    """Layout of `rank` among `size` ranks sharing a sequence of `num_tokens`: chunks `rank` and `2 size - 1 - rank`.

    The sequence is cut into 2 size chunks; pairing an early one with a late one gives every rank the same number of
    visible (query, key) pairs under a causal mask. Raises ValueError when 2 size does not divide num_tokens.
    """
    if not 0 <= rank < size:
        raise ValueError(f"zigzag: rank {rank} is not one of {size}")
    if num_tokens % (2 * size):
        raise ValueError(f"zigzag: {num_tokens} tokens cannot be cut into 2 x {size} equal chunks")
    chunk = num_tokens // (2 * size)
    back = 2 * size - 1 - rank
    return SeqLayout(((rank * chunk, (rank + 1) * chunk), (back * chunk, (back + 1) * chunk)))
