"""Layouts of one rank: any runs on any rank, which no rule gives, and those of packed documents."""

from __future__ import annotations

import random
from collections.abc import Callable

from longring.kernels.layout import SeqLayout
from longring.parallel.cp.grid import Layout
from longring.parallel.cp.layout import joined
from longring.parallel.cp.packed import divided

MOST_RUNS = 64
"""The largest number of runs of a rank."""


def scattered(num_tokens: int, rank: int, size: int) -> SeqLayout:
    """Return the layout of one rank where each holds a random number of random runs; equal arguments, equal layouts."""
    rng = random.Random(1000 * num_tokens + size)
    num_chunks = rng.randint(size, min(num_tokens, MOST_RUNS * size))
    edges = [0, *sorted(rng.sample(range(1, num_tokens), num_chunks - 1)), num_tokens]
    owners = [*range(size), *(rng.randrange(size) for _ in range(num_chunks - size))]  # every rank has a chunk
    rng.shuffle(owners)
    mine = [SeqLayout(((edges[n], edges[n + 1]),)) for n, owner in enumerate(owners) if owner == rank]
    return joined(mine)


def of_packing(
    layout: Layout, starts: tuple[int, ...], ranks_per_node: int | None = None
) -> Callable[[int, int, int], SeqLayout]:
    """Return the function that gives the layout of one rank for these documents, called as `scattered` is."""
    return lambda num_tokens, rank, size: SeqLayout(
        divided(layout, num_tokens, starts, size, ranks_per_node=ranks_per_node)[rank]
    )
