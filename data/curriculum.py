"""Which bucket each optimizer step trains on: Dataset Decomposition's Algorithm 1 (arXiv 2405.13226), as a list.

A step's whole global batch comes from one bucket and has the same number of tokens in every bucket.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from .config import Odds


def schedule(tokens_per_bucket: Sequence[int], steps: int, odds: Odds, cycles: int, seed: int) -> NDArray[np.int64]:
    """Return the bucket of every step, int64 [steps]; buckets are numbered as given, shortest first.

    The steps are divided among the buckets in proportion to their tokens, and each bucket's share into `cycles`
    near-equal parts. Within a cycle a bucket is drawn, without replacement, with probability in proportion to its
    odds among those that have batches left. A share may exceed the bucket's own batches: its next pass then begins.

    Raises ValueError when there are no tokens, fewer than one step or fewer than one cycle.
    """
    if sum(tokens_per_bucket) < 1 or steps < 1 or cycles < 1:
        raise ValueError(
            f"cannot schedule {steps} steps in {cycles} cycles over {sum(tokens_per_bucket)} tokens; "
            "each must be positive"
        )
    shares = _largest_remainder(tokens_per_bucket, steps)
    chosen: list[int] = []
    for cycle in range(cycles):
        left = [share * (cycle + 1) // cycles - share * cycle // cycles for share in shares]
        # A spawn key for each cycle: its draws do not depend on how many the others made.
        uniform = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(cycle,))))
        for draw in uniform.random(sum(left)).tolist():
            cumulative = list(accumulate(_weights(odds, left)))
            bucket = bisect_right(cumulative, draw * cumulative[-1])
            left[bucket] -= 1
            chosen.append(bucket)
    return np.array(chosen, dtype=np.int64)


def _weights(odds: Odds, left: Sequence[int]) -> list[int]:
    """Return each bucket's chance, not normalised: 0 where nothing is left."""
    last = len(left) - 1
    match odds:
        case "uniform":
            return [int(count > 0) for count in left]
        case "natural":
            return list(left)
        case "grow_linear":
            return [(last - bucket + 1) * (count > 0) for bucket, count in enumerate(left)]
        case "grow_p2":
            return [(1 << (last - bucket)) * (count > 0) for bucket, count in enumerate(left)]


def _largest_remainder(weights: Sequence[int], total: int) -> list[int]:
    """Divide `total` in proportion to the weights, exactly, in integers; equal remainders favour the first."""
    whole = sum(weights)
    shares = [total * weight // whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda index: -(total * weights[index] % whole))
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares
