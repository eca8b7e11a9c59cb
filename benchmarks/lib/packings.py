"""Packings of documents, and the layouts that a benchmark compares on them."""

from __future__ import annotations

import random
import sysconfig
from itertools import pairwise
from math import log
from pathlib import Path

import numpy as np
from longring.parallel.cp.grid import Layout
from longring.parallel.cp.packed import Runs, divided

CHARACTERS_PER_TOKEN = 4
"""Characters of a Python file that count as a token: the distribution of lengths matters here, not the tokens."""
LAYOUTS: tuple[Layout, ...] = ("zigzag", "balanced", "documents")


def lognormal(mean: int, num_tokens: int, seed: int, multiple_of: int = 1) -> tuple[int, ...]:
    """Return the starts of documents of lognormal lengths (sigma 1), each a multiple of a number."""
    rng = random.Random(seed)
    return _starts(lambda: rng.lognormvariate(log(mean) - 0.5, 1.0), num_tokens, multiple_of)


def files(folder: str, num_tokens: int, seed: int, multiple_of: int = 1, scale: int = 1) -> tuple[int, ...]:
    """Return the starts of random Python files of "stdlib" or of "site-packages", end to end, `scale` times shorter."""
    rng, lengths = random.Random(seed), _file_tokens(folder)
    return _starts(lambda: rng.choice(lengths) / scale, num_tokens, multiple_of)


def each_document(num_tokens: int, starts: tuple[int, ...], size: int) -> list[Runs]:
    """Return the runs of each rank where every document is in zigzag, cut into 2 x size equal parts (Megatron's way).

    All lengths must be multiples of 2 x size.
    """
    found: list[Runs] = []
    for rank in range(size):
        runs: list[tuple[int, int]] = []
        for start, stop in pairwise((*starts, num_tokens)):
            part = (stop - start) // (2 * size)
            early, late = start + rank * part, stop - (rank + 1) * part
            runs += [(early, early + part), (late, late + part)]
        found.append(tuple(runs))
    return found


def layouts(num_tokens: int, starts: tuple[int, ...], size: int, ranks_per_node: int) -> dict[str, list[Runs]]:
    """Return the layouts by name."""
    found = {layout: divided(layout, num_tokens, starts, size, ranks_per_node=ranks_per_node) for layout in LAYOUTS}
    return {**found, "each document in 2 cp": each_document(num_tokens, starts, size)}


def _starts(draw, num_tokens: int, multiple_of: int) -> tuple[int, ...]:
    starts = [0]
    while starts[-1] < num_tokens:
        starts.append(starts[-1] + max(1, round(draw() / multiple_of)) * multiple_of)
    return tuple(starts[:-1])


def _file_tokens(folder: str) -> list[int]:
    root = Path(sysconfig.get_paths()["stdlib"]) if folder == "stdlib" else Path(np.__file__).parents[1]
    found = (path for path in sorted(root.rglob("*.py")) if folder != "stdlib" or "site-packages" not in path.parts)
    tokens = [path.stat().st_size // CHARACTERS_PER_TOKEN for path in found]
    return [length for length in tokens if length >= 16]
