"""Renewals of the mix: shares of sources that follow their held-out losses (Skill-it, arXiv 2307.14430, section 3).

Skill-it is online mirror descent on the mixture of sources. Its rule is p_i = exp(eta sum_j A_ij sum_t L_j(t)), scaled
to sum to 1: A is the skills graph, and t runs over the last measurements of the losses L. Here the mix that the recipe
gives a cycle stands in for the paper's uniform start, and a renewal counts the losses of the weights of its own step,
where the paper's are one round older. With the default graph, the identity, and a window as long as the run, the rule
is multiplicative weights. A renewal is a measurement and nothing else: the mix follows from the recipe and the
measurements, so a run that has its measurements has its batches.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from decimal import Context, Decimal
from math import fsum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..curriculum_config import CurriculumConfig, RenewalConfig
from ..format.bucket import Bucket
from ..format.manifest import Manifest
from .shares import Cell, Cells, Shares


class Renewal(NamedTuple):
    """Held-out losses of the sources, by which the shares are renewed."""

    step: int
    """Number of steps done when they were measured."""
    losses: Mapping[str, float]
    """Mean loss of each source that is trained, nats per token."""


def trained_sources(cells: Cells) -> tuple[str, ...]:
    """Return the sources that have training sequences in the buckets in use."""
    return tuple(
        name for name, column in zip(cells.sources, zip(*cells.tokens, strict=True), strict=True) if any(column)
    )


def renewed(shares: Shares, cells: Cells, curriculum: CurriculumConfig, renewals: Sequence[Renewal]) -> Shares:
    """Return the shares of a cycle that begins after `renewals`, oldest first; `shares` are those of the recipe.

    Tokens move between sources within each bucket that `curriculum.shares` names, and among all other buckets; named
    buckets and cells keep their shares, and so renewed shares never contradict the recipe.
    """
    exponents = _exponents(trained_sources(cells), curriculum.renewal, renewals)
    groups: dict[int, list[Cell]] = defaultdict(list)  # bucket → cells; -1 is all buckets without a share
    for bucket, length in enumerate(cells.lengths):
        for index, source in enumerate(cells.sources):
            if shares[bucket][index] and f"{source}@{length}" not in curriculum.shares:
                groups[bucket if f"@{length}" in curriculum.shares else -1].append((bucket, index))
    result = [list(row) for row in shares]
    for group in groups.values():
        # With it subtracted, exponents are at most 0, so none overflows.
        highest = max(exponents[cells.sources[index]] for _, index in group)
        for bucket, index in group:
            result[bucket][index] *= _exp(exponents[cells.sources[index]] - highest)
        # The cell with the highest exponent keeps its share here, so the sum is not 0.
        scale = fsum(shares[b][s] for b, s in group) / fsum(result[b][s] for b, s in group)
        for bucket, index in group:
            result[bucket][index] *= scale
    return tuple(map(tuple, result))


def _exponents(sources: Sequence[str], config: RenewalConfig, renewals: Sequence[Renewal]) -> dict[str, float]:
    """Return eta sum_j A_ij sum_t L_j(t) of each source i."""
    measured = [renewal.losses for renewal in renewals[-config.window :]] or [dict.fromkeys(sources, 1.0)]
    sums = {source: fsum(losses[source] for losses in measured) for source in sources}
    helps = {source: {source: 1.0, **config.graph.get(source, {})} for source in sources}  # [i][j]
    return {i: config.rate * fsum(effect * sums[j] for j, effect in helps[i].items()) for i in sources}


def _exp(value: float) -> float:
    """Return e to the power `value`, the same on every processor: unlike math.exp, Decimal's is exactly rounded."""
    return float(Decimal(value).exp(Context(prec=28)))


def check_renewals(manifest: Manifest, cells: Cells, config: RenewalConfig, num_cycles: int) -> None:
    """Raise ValueError unless shares can be renewed.

    That takes several cycles, and several sources that are trained, each with held-out sequences.
    """
    if num_cycles < 2:
        raise ValueError(
            f"curriculum.renewal.rate = {config.rate}: shares are renewed between two cycles, and the steps of this "
            "run are too few for a second one with a slot for each bucket; raise train.steps, or set the rate to 0"
        )
    config.check_sources(trained_sources(cells))
    held_out_sequences(manifest, cells, config)


def held_out_sequences(
    manifest: Manifest, cells: Cells, config: RenewalConfig
) -> tuple[tuple[Bucket, NDArray[np.int64]], ...]:
    """Return the held-out sequences on which losses are measured, by bucket in use, int64 [sequences].

    Those of each source have at most `config.held_out_tokens` tokens in all, divided among its buckets as its held-out
    tokens are, and lie evenly in each. Raises ValueError if a source has none.
    """
    buckets = [bucket for bucket in manifest.buckets("held_out") if bucket.length in cells.lengths]
    chosen: list[list[NDArray[np.int64]]] = [[] for _ in buckets]
    trained = trained_sources(cells)
    for index, source in enumerate(cells.sources):
        if source not in trained:
            continue
        available = [bucket.parts[index].sequences for bucket in buckets]
        for numbers, bucket, count in zip(chosen, buckets, _counts(source, buckets, available, config), strict=True):
            first = sum(part.sequences for part in bucket.parts[:index])  # the source's first in the bucket
            numbers.append(first + np.arange(count) * bucket.parts[index].sequences // max(count, 1))
    numbered = zip(buckets, map(np.concatenate, chosen), strict=True)
    return tuple((bucket, numbers) for bucket, numbers in numbered if len(numbers))


def _counts(source: str, buckets: Sequence[Bucket], available: Sequence[int], config: RenewalConfig) -> list[int]:
    """Return how many of a source's held-out sequences are read from each bucket. Raises ValueError if that is none."""
    tokens = sum(bucket.length * count for bucket, count in zip(buckets, available, strict=True))
    if not tokens:
        raise ValueError(
            f"curriculum.renewal.rate = {config.rate}: source {source!r} has no held-out sequence in the buckets in "
            "use; set it to 0, or prepare other data with a larger data.held_out_fraction"
        )
    limit = config.held_out_tokens
    counts = [min(count, limit * count // tokens) for count in available]  # rounded down: at most `limit` in all
    if not any(counts):
        shortest = next(index for index, count in enumerate(available) if count)  # buckets ascend
        if buckets[shortest].length > limit:
            raise ValueError(
                f"curriculum.renewal.held_out_tokens = {limit}: the shortest held-out sequence of source {source!r} "
                f"has {buckets[shortest].length} tokens; raise it to at least that"
            )
        counts[shortest] = 1
    return counts
