"""The curriculum: the bucket of every slot of a run, by Algorithm 1 of Dataset Decomposition (arXiv 2405.13226).

A slot is a part of a step that trains on one bucket: the whole step, or under mix "micro_batch" one of several. All
slots have the same number of tokens. A run is cut into cycles of near-equal numbers of steps, in each of which the mix
is constant, and a cycle's slots are divided among the buckets before they are put into an order.

Drawing buckets without replacement is equivalent to sorting independent random times, so one sort gives a whole cycle.
Each of a bucket's n slots draws an exponential time E of rate 1. Where the probability of a bucket is proportional to
odds x slots left, the slots' times are E / odds (Efraimidis and Spirakis, IPL 2006). Where a bucket has a constant
rate while any slot is left, its times are the running sums of E / rate (superposed Poisson processes). Mix
"micro_batch" takes the quantiles of these times instead: slot k of n is at the time by which the bucket has given
k + 1/2 slots on average.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..curriculum_config import CurriculumConfig
from .shares import WEIGHT_SUM


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


def cycle_begins(total: int, cycles: int) -> list[int]:
    """Return the index at which each of the cycles of `total` steps begins, and `total` at the end, [cycles + 1]."""
    return [total * cycle // cycles for cycle in range(cycles + 1)]


def divide_slots(slots: Sequence[int], weights: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return how many of each cycle's slots every bucket gets, [cycles][buckets].

    `slots` [cycles] are the numbers of slots; `weights` [cycles][buckets] are shares in parts of WEIGHT_SUM. Each slot
    goes to the bucket that is furthest behind its due, the sum of its shares of all slots so far. A cycle depends on
    those before it alone, and the buckets never drift: of B buckets, none is after any cycle more than 1 - 1/B slots
    ahead of its due, or more than 1/2 + 1/3 + ... + 1/B behind it. Ahead: the slots still to be given are the sum of
    what is due, so the largest is at least 1/B. Behind: let f(k) be the most that k buckets can be behind in all, at
    first 0. The bucket chosen is not behind k others unless it is further behind than their mean, so
    f(k) <= k/(k + 1) (f(k + 1) + 1), and f(B) = 0 gives f(1).
    """
    due = [0] * len(weights[0])
    result = []
    for count, shares in zip(slots, weights, strict=True):
        due = [late + count * share for late, share in zip(due, shares, strict=True)]
        # The slots that leave a bucket at least B - 1 behind are among the first `count`, whatever the others' dues.
        given = [max(0, late // WEIGHT_SUM - len(due) + 1) for late in due]
        due = [late - slot * WEIGHT_SUM for late, slot in zip(due, given, strict=True)]
        # Fewer than B^2 slots are left, however long the cycle is.
        for _ in range(count - sum(given)):
            chosen = due.index(max(due))
            given[chosen] += 1
            due[chosen] -= WEIGHT_SUM
        result.append(given)
    return result


def draw_slots(
    counts: Sequence[Sequence[int]], lengths: Sequence[int], config: CurriculumConfig, seed: int
) -> NDArray[np.uint8]:
    """Return the index of the bucket of every slot of a run, in order, uint8 [slots].

    `counts` [cycles][buckets] are the slots that each bucket gets in each cycle, and `lengths` the buckets', shortest
    first. Within a cycle buckets are drawn without replacement, with the probabilities that `config.draw` names. With
    quantiles, for mix "micro_batch", every bucket has after any slot given, within 1/2, its average number of slots at
    one time common to all. Raises ValueError as `bucket_odds` does.
    """
    odds = bucket_odds(config, len(lengths))
    cycles = []
    for cycle, part in enumerate(counts):
        times = [
            # Each (cycle, length) has its own key, so its draws do not depend on the number of draws of the others.
            _times(count, odds[bucket], config, np.random.SeedSequence(seed, spawn_key=(cycle, lengths[bucket])))
            for bucket, count in enumerate(part)
        ]
        buckets = np.repeat(np.arange(len(part), dtype=np.uint8), part)  # [slots of the cycle], as `times`
        cycles.append(buckets[np.argsort(np.concatenate(times), kind="stable")])
    return np.concatenate(cycles)


def _times(count: int, odds: float, config: CurriculumConfig, seed: np.random.SeedSequence) -> NDArray[np.float64]:
    """Return the times at which a bucket's `count` slots of a cycle are drawn, float64 [count]."""
    left = config.odds == "natural" or config.draw == "odds_times_left"
    if config.mix == "micro_batch":
        middles = (np.arange(count) + 0.5) / max(count, 1)  # quantile of each slot
        times = -exact_log(1.0 - middles) if left else middles * count
    else:
        # Uniform on (0, 1] in steps of 2^-53.
        uniform = 1.0 - np.random.Generator(np.random.Philox(seed)).random(count)
        exponential = -exact_log(uniform)
        times = exponential if left else np.cumsum(exponential)
    return times / (odds * count if not left and config.draw == "odds_times_batches" else odds)


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
    for power in range(21, 0, -2):  # Horner's rule, from ratio^20 / 21 down
        series = series * square + 1 / power
    return (exponent - low) * 0.6931471805599453 + 2 * ratio * series
