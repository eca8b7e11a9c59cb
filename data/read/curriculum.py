"""Which bucket each optimizer step trains on: Dataset Decomposition's Algorithm 1 (arXiv 2405.13226), as a list.

A step's whole global batch comes from one bucket and has the same number of tokens in every bucket.

Drawing without replacement, step by step, is the order in which independent clocks strike, so a whole cycle is one
sort. Give each of a bucket's n batches an exponential time E of rate 1: where the chance is odds × batches left, batch
times E / odds are independent of each other (Efraimidis and Spirakis, IPL 2006); where it is a constant rate while any
batch is left, a bucket's times are the running sums of E / rate (superposed Poisson processes).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..config import CurriculumConfig


def bucket_odds(config: CurriculumConfig, num_buckets: int) -> tuple[float, ...]:
    """Return the odds of each bucket, shortest first. Raises ValueError for odds of another number of buckets."""
    match config.odds:
        case "uniform" | "natural":
            return (1.0,) * num_buckets
        case "grow_linear":
            return tuple(float(num_buckets - bucket) for bucket in range(num_buckets))
        case "grow_p2":
            return tuple(2.0 ** (num_buckets - 1 - bucket) for bucket in range(num_buckets))
        case "grow_p100":
            return tuple(100.0 ** (num_buckets - 1 - bucket) for bucket in range(num_buckets))
        case "shrink_p100":
            return tuple(100.0**bucket for bucket in range(num_buckets))
        case odds:
            if len(odds) != num_buckets:
                raise ValueError(
                    f"curriculum.odds has {len(odds)} numbers, {list(odds)}, and the data {num_buckets} buckets; "
                    "name one for each, shortest first"
                )
            return odds


def step_buckets(
    tokens_per_bucket: Sequence[int], steps: int, config: CurriculumConfig, seed: int
) -> NDArray[np.uint8]:
    """Return the bucket of every step, uint8 [steps]: element 0 is that of step 1; buckets are numbered as given.

    The steps are divided among the buckets in proportion to their tokens, and each bucket's share into
    `config.cycles` near-equal parts. Within a cycle a bucket is drawn, without replacement, with the chance that
    `config.draw` names. A share may exceed the bucket's own batches: its next pass then begins.

    Raises ValueError when there are no tokens or fewer than one step.
    """
    if sum(tokens_per_bucket) < 1 or steps < 1:
        raise ValueError(f"cannot divide {steps} steps among {sum(tokens_per_bucket)} tokens; each must be positive")
    odds = bucket_odds(config, len(tokens_per_bucket))
    shares = largest_remainder(tokens_per_bucket, steps)
    cycles = []
    for cycle in range(config.cycles):
        part = [share * (cycle + 1) // config.cycles - share * cycle // config.cycles for share in shares]
        times = [
            # A key for each cycle and bucket: its draws do not depend on how many the others made.
            _times(count, odds[bucket], config, np.random.SeedSequence(seed, spawn_key=(cycle, bucket)))
            for bucket, count in enumerate(part)
        ]
        buckets = np.repeat(np.arange(len(part), dtype=np.uint8), part)
        cycles.append(buckets[np.argsort(np.concatenate(times), kind="stable")])
    return np.concatenate(cycles)


def _times(count: int, odds: float, config: CurriculumConfig, seed: np.random.SeedSequence) -> NDArray[np.float64]:
    """Return when a bucket's `count` batches of a cycle are drawn."""
    # Uniform on (0, 1] in steps of 2^-53.
    uniform = 1.0 - np.random.Generator(np.random.Philox(seed)).random(count)
    exponential = -exact_log(uniform)
    if config.odds == "natural" or config.draw == "odds_times_left":
        return exponential / odds
    return np.cumsum(exponential) / (odds * count if config.draw == "odds_times_batches" else odds)


def exact_log(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the natural logarithm of positive numbers, within some 1e-15 relative.

    np.log differs in the last bit from processor to processor, and a run's order must not: this takes IEEE 754's
    exactly rounded + - * / only. log(m 2^e) = e log 2 + 2 artanh((m - 1) / (m + 1)), m in [sqrt(1/2), sqrt(2)).
    """
    mantissa, exponent = np.frexp(values)
    low = mantissa < 0.7071067811865476
    mantissa = np.where(low, 2 * mantissa, mantissa)
    ratio = (mantissa - 1) / (mantissa + 1)
    square = ratio * ratio
    # |ratio| < 0.172, so the first term left out is below 1e-17 of the sum.
    series = np.zeros_like(ratio)
    for power in range(21, 0, -2):
        series = series * square + 1 / power
    return (exponent - low) * 0.6931471805599453 + 2 * ratio * series


def largest_remainder(weights: Sequence[int], total: int) -> list[int]:
    """Divide `total` in proportion to the weights, exactly, in integers; equal remainders favour the first."""
    whole = sum(weights)
    shares = [total * weight // whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda index: -(total * weights[index] % whole))
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares
