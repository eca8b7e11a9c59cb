"""The held-out buckets and sequences that an evaluation reads, and those that it leaves out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...data.format.bucket import Bucket
from ...data.format.manifest import Manifest
from ..config import Recipe


def held_out_buckets(recipe: Recipe, manifest: Manifest) -> list[tuple[Bucket, int]]:
    """Return the held-out buckets of a recipe, and the number of sequences of each that an evaluation reads.

    Raises ValueError if an evaluation would read no sequence.
    """
    limit = recipe.evaluate.max_tokens_per_bucket
    numbers = [(bucket, min(bucket.sequences, limit // bucket.length)) for bucket in _in_use(recipe, manifest)]
    found = [(bucket, number) for bucket, number in numbers if number]
    if not found:
        raise ValueError(
            f"evaluate.max_tokens_per_bucket = {limit}: no held-out sequence of {recipe.training_directory} is that "
            "short; raise it, or prepare other data with a larger data.held_out_fraction"
        )
    return found


def check_judged(recipe: Recipe, manifest: Manifest) -> None:
    """Raise ValueError unless an evaluation reads a sequence for LongPPL, whose key tokens a judge chooses."""
    config, longest = recipe.evaluate, max(bucket.length for bucket, _ in held_out_buckets(recipe, manifest))
    if not config.context_sequences or config.short_tokens >= longest:
        raise ValueError(
            f"evaluate.context_sequences = {config.context_sequences}, evaluate.short_tokens = {config.short_tokens}: "
            "no sequence for LongPPL, and a judge is for nothing else; set evaluate.context_sequences above 0 and "
            f"evaluate.short_tokens below the longest bucket that is read, {longest} tokens, or leave out --judge"
        )


def left_out_buckets(recipe: Recipe, manifest: Manifest) -> list[dict[str, Any]]:
    """Return the length of each other bucket of a recipe, with the reason why an evaluation reads nothing of it."""
    limit, found = recipe.evaluate.max_tokens_per_bucket, []
    for bucket in _in_use(recipe, manifest):
        if not bucket.sequences:
            reason = "the data has no held-out sequence of this length; prepare it with a larger data.held_out_fraction"
        elif bucket.length > limit:
            reason = f"evaluate.max_tokens_per_bucket = {limit}: below one sequence; raise it to {bucket.length}"
        else:
            continue
        found.append({"length": bucket.length, "reason": reason})
    return found


def _in_use(recipe: Recipe, manifest: Manifest) -> list[Bucket]:
    return [bucket for bucket in manifest.buckets("held_out") if bucket.length in recipe.lengths]


def evenly(bucket: Bucket, count: int) -> NDArray[np.int64]:
    """Return the numbers of `count` sequences that lie evenly over a bucket, its sources too: int64 `[count]`."""
    return np.arange(count) * bucket.sequences // count
