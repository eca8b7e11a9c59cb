"""The curriculum: the bucket that each step trains on, by Algorithm 1 of Dataset Decomposition (arXiv 2405.13226).

The whole global batch of a step comes from one bucket and has the same number of tokens for every bucket.

Drawing buckets without replacement is equivalent to sorting independent random times, so one sort gives a whole cycle.
Each of a bucket's n batches draws an exponential time E of rate 1. Where the probability of a bucket is proportional to
odds x batches left, the batches' times are E / odds (Efraimidis and Spirakis, IPL 2006). Where a bucket has a constant
rate while any batch is left, its times are the running sums of E / rate (superposed Poisson processes).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..config import CurriculumConfig


def bucket_odds(config: CurriculumConfig, num_buckets: int) -> tuple[float, ...]:
    """Return the odds of each bucket, shortest first. Raises ValueError if `config.odds` lists another number."""
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
                    f"curriculum.odds = {list(odds)}: the data has {num_buckets} buckets; give one number for each, "
                    "shortest first"
                )
            return odds


def step_buckets(
    tokens_per_bucket: Sequence[int], steps: int, config: CurriculumConfig, seed: int
) -> NDArray[np.uint8]:
    """Return the index of each step's bucket, uint8 [steps]; element 0 belongs to step 1.

    `tokens_per_bucket` are the tokens of a pass over each bucket, shortest bucket first. The steps are divided among
    the buckets in proportion to them, and each bucket's share into `config.cycles` near-equal parts. Within a cycle
    buckets are drawn without replacement, with the probabilities that `config.draw` names. If a share exceeds the
    bucket's own batches, its next pass begins.

    Raises ValueError if there are no tokens, if `steps` is less than 1, or as `bucket_odds` does.
    """
    if sum(tokens_per_bucket) < 1 or steps < 1:
        raise ValueError(
            f"steps = {steps}: {steps} steps among {sum(tokens_per_bucket)} tokens; give at least 1 step and 1 token"
        )
    odds = bucket_odds(config, len(tokens_per_bucket))
    shares = largest_remainder(tokens_per_bucket, steps)
    cycles = []
    for cycle in range(config.cycles):
        # [buckets]: steps of each bucket in this cycle; the parts of all cycles sum to its share.
        part = [share * (cycle + 1) // config.cycles - share * cycle // config.cycles for share in shares]
        times = [
            # Each (cycle, bucket) has its own key, so its draws do not depend on the number of draws of the others.
            _times(count, odds[bucket], config, np.random.SeedSequence(seed, spawn_key=(cycle, bucket)))
            for bucket, count in enumerate(part)
        ]
        buckets = np.repeat(np.arange(len(part), dtype=np.uint8), part)  # [steps of the cycle], as `times`
        cycles.append(buckets[np.argsort(np.concatenate(times), kind="stable")])
    return np.concatenate(cycles)


def _times(count: int, odds: float, config: CurriculumConfig, seed: np.random.SeedSequence) -> NDArray[np.float64]:
    """Return the times at which a bucket's `count` batches of a cycle are drawn, float64 [count]."""
    # Uniform on (0, 1] in steps of 2^-53.
    uniform = 1.0 - np.random.Generator(np.random.Philox(seed)).random(count)
    exponential = -exact_log(uniform)
    if config.odds == "natural" or config.draw == "odds_times_left":
        return exponential / odds
    return np.cumsum(exponential) / (odds * count if config.draw == "odds_times_batches" else odds)


def exact_log(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the natural logarithm of positive `values` [n], with a relative error of some 1e-15, float64 [n].

    np.log differs in the last bit between processors, and the order of a run must not. This function uses only the
    exactly rounded + - * / of IEEE 754: log(m 2^e) = e log 2 + 2 artanh((m - 1) / (m + 1)), m in [sqrt(1/2), sqrt(2)).
    """
    mantissa, exponent = np.frexp(values)
    # frexp gives [1/2, 1); doubling the lower half moves it to [sqrt(1/2), sqrt(2)), where the series is short.
    low = mantissa < 0.7071067811865476
    mantissa = np.where(low, 2 * mantissa, mantissa)
    ratio = (mantissa - 1) / (mantissa + 1)
    square = ratio * ratio
    # |ratio| < 0.172, so the first omitted term of the series is below 1e-17 of the sum.
    series = np.zeros_like(ratio)
    for power in range(21, 0, -2):
        series = series * square + 1 / power
    return (exponent - low) * 0.6931471805599453 + 2 * ratio * series


def largest_remainder(weights: Sequence[int], total: int) -> list[int]:
    """Return integers in proportion to `weights` whose sum is `total`; of equal remainders the first is rounded up."""
    weight_sum = sum(weights)
    shares = [total * weight // weight_sum for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda index: -(total * weights[index] % weight_sum))
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares
