"""The endless stream of one bucket, from which the slots that train on the bucket take their sequences.

Each source's part of the bucket is an endless stream of its own: pass after pass over the source's sequences, each in
another order, permuted by a key of (seed, length, source, pass). The bucket's stream merges them. At position t of the
stream source s is due X_s(t) sequences: the sum of its shares of the positions before t, a piecewise linear function
with a knot wherever the mix changes. Time t runs through the integers, and at each a source gives its next sequence,
number k, if its due has reached k + 1/2 (the method of Sainte-Lague); of several sources the first in order begins.

At time t source s has given c_s = floor(X_s(t) + 1/2) sequences. The dues sum to t, so with S sources all of them have
given t sequences within S/2, and the position is at most S/2 + 1 from the time. So a mix that begins at a position
counts from S/2 + 1 times later on: the positions before it have been given by then, and none depends on a later mix.
Hence, with w the largest of the source's shares so far, it has given its due at any position within 1/2 + w (S + 2)
sequences, and within 1/2 + w (S/2 + 1) if its share never changes. Where the shares are the natural ones, its due after
p passes over the bucket is p times the number of its sequences, so every sequence comes exactly once in each pass over
the bucket. Nothing here has state: any position is computed from the knots alone.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..format.bucket import Bucket
from ..permutation import permute
from .shares import WEIGHT_SUM

POSITIONS_AT_ONCE = 1 << 12
"""Number of stream positions whose sequences are computed at once: numpy's overhead of some 0.2 ms then serves several
steps, and a rank of a large world, which needs few of the positions, loses less than a millisecond."""
KEPT_RANGES = 4
"""Number of most recently computed ranges of positions to keep."""


@dataclass(frozen=True, kw_only=True)
class SourcePart:
    """One source's part of a bucket."""

    source: str
    """Name of the source."""
    first_sequence: int
    """Index in the bucket of the source's first sequence; its others follow."""
    shard_sequences: tuple[int, ...]
    """Number of sequences in each of the source's shards, in order."""
    window: int = 0
    """About the number of sequences in a shuffle window; 0: all of the source."""

    @cached_property
    def sequences(self) -> int:
        """Number of the source's sequences; kept, as a source may have 10^5 shards."""
        return sum(self.shard_sequences)


class Knot(NamedTuple):
    """A change of the mix within a bucket."""

    position: int
    """First position with these weights."""
    weights: tuple[int, ...]
    """Share of each source, in parts of WEIGHT_SUM."""


class Windows(NamedTuple):
    """Shards of a source in the order of one pass, in runs that are shuffle windows."""

    shards: NDArray[np.int64]
    """Index of each shard, in the order of the pass."""
    ends: NDArray[np.int64]
    """Position in the pass at which each of them ends."""
    begins: NDArray[np.int64]
    """Position in the pass at which each shuffle window begins, and the end of the last one, [windows + 1]."""


class BucketOrder:
    """The endless stream of one bucket: a function from positions in the stream to sequences.

    `knots` are the mixes by position, the first at 0; only sources with sequences have weights. `key` identifies the
    bucket and the run's seed.
    """

    def __init__(self, parts: Sequence[SourcePart], knots: Sequence[Knot], key: tuple[int, ...]):
        self.parts = tuple(parts)
        # Of several knots at one position, between which the bucket has no slots, the last holds.
        last = list({knot.position: knot for knot in knots}.values())
        # A source's stream merges with others' at most this far from its time.
        self._margin = len(self.parts) // 2 + 1
        # By time: a mix counts when every position before its own has been given.
        self._knots = tuple(
            Knot(knot.position + self._margin if i else 0, knot.weights)
            for i, knot in enumerate(last)
            if not i or knot.weights != last[i - 1].weights
        )
        self._key = key
        # Due of each source at each knot, in parts of WEIGHT_SUM; a sum of all cycles would overflow int64.
        self._dues = [[0] * len(self.parts)]
        for knot, after in zip(self._knots, self._knots[1:], strict=False):
            passed = after.position - knot.position
            self._dues.append([due + passed * w for due, w in zip(self._dues[-1], knot.weights, strict=True)])
        self._ranges: dict[int, NDArray[np.int64]] = {}
        self._windows: dict[tuple[int, int], Windows] = {}

    @cached_property
    def sequences(self) -> int:
        """Number of sequences of all sources."""
        return sum(part.sequences for part in self.parts)

    def equal_positions(self, other: "BucketOrder") -> int | None:
        """Return a number of first positions at which both streams have the same sequences; None means all."""
        if (self.parts, self._key) != (other.parts, other._key):
            return 0
        ours, theirs = self._knots, other._knots
        if ours == theirs:
            return None
        # None marks the end of the knots of each stream.
        unlike = next((a, b) for a, b in zip([*ours, None], [*theirs, None], strict=False) if a != b)
        return max(0, min(knot.position for knot in unlike if knot is not None) - self._margin)

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sequences at stream `positions` [n], as indices into the bucket, int64 [n]."""
        ranges, offsets = np.divmod(positions, POSITIONS_AT_ONCE)
        result = np.empty_like(positions)
        for number in np.unique(ranges).tolist():
            here = ranges == number
            result[here] = self._range(number)[offsets[here]]
        return result

    def given(self, positions: int) -> NDArray[np.int64]:
        """Return how many of the first `positions` positions of the stream each source has, int64 [sources]."""
        sources, _, before = self._merged(positions, 0)
        assert not len(sources)
        return before

    def _range(self, number: int) -> NDArray[np.int64]:
        """Return the sequences at the `number`-th range of POSITIONS_AT_ONCE stream positions, int64 [positions]."""
        # Two threads may compute the same range; each returns what it found, whatever the other keeps.
        found = self._ranges.get(number)
        if found is None:
            found = np.empty(POSITIONS_AT_ONCE, dtype=np.int64)
            sources, numbers, _ = self._merged(number * POSITIONS_AT_ONCE, POSITIONS_AT_ONCE)
            for source in np.unique(sources).tolist():
                here = sources == source
                found[here] = self._from_source(source, numbers[here])
            # A dict keeps the order of insertion, so the oldest range is left out.
            kept = list(self._ranges.items())[1 - KEPT_RANGES :]
            self._ranges = dict([*kept, (number, found)])
        return found

    def _merged(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return source and number in the source's stream of `count` positions from `first`, and the counts before.

        All are int64: [count], [count] and [sources].
        """
        begin = max(0, first - self._margin)
        counts = self._counts(begin, first + count + self._margin)  # [times + 1, sources]
        # A share is at most 1, so a source gives at most one sequence at a time; time by time, sources in order.
        times, sources = np.nonzero(np.diff(counts, axis=0))
        skipped = first - int(counts[0].sum())  # positions from the first time to `first`
        assert 0 <= skipped <= len(sources) - count, "the margins cover the positions"
        before = counts[0] + np.bincount(sources[:skipped], minlength=len(self.parts))
        chosen = slice(skipped, skipped + count)
        return sources[chosen], counts[times[chosen], sources[chosen]], before

    def _counts(self, first: int, last: int) -> NDArray[np.int64]:
        """Return how many sequences each source has given at times `first` to `last`, [last - first + 1, sources]."""
        parts = []
        index = bisect_right(self._knots, first, key=lambda knot: knot.position) - 1
        while first <= last:
            knot, after = self._knots[index], self._knots[index + 1 : index + 2]
            stop = min(last + 1, after[0].position) if after else last + 1
            # The due at `first` in whole numbers; what is computed from there fits 64 bits. [sources]
            dues = [due + (first - knot.position) * w for due, w in zip(self._dues[index], knot.weights, strict=True)]
            whole, rest = zip(*(divmod(2 * due + WEIGHT_SUM, 2 * WEIGHT_SUM) for due in dues), strict=True)
            added = 2 * np.arange(stop - first)[:, None] * np.array(knot.weights, dtype=np.int64)  # [times, sources]
            parts.append(np.array(whole) + (np.array(rest) + added) // (2 * WEIGHT_SUM))
            first, index = stop, index + 1
        return np.concatenate(parts)

    def _from_source(self, source: int, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sequences with `numbers` [n] in a source's own endless stream; each of its passes is shuffled."""
        part = self.parts[source]
        passes, in_pass = np.divmod(numbers, part.sequences)
        result = np.empty_like(numbers)
        for pass_number in np.unique(passes).tolist():
            here, key = passes == pass_number, (*self._key, part.source, pass_number)
            if part.window:
                mixed = self._windowed(part, source, pass_number, in_pass[here])
            else:
                mixed = permute(in_pass[here], part.sequences, key=key)
            result[here] = part.first_sequence + mixed
        return result

    def _windowed(
        self, part: SourcePart, source: int, pass_number: int, positions: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return the sequences of a source at `positions` [n] of one pass, which reads a window's shards at a time."""
        sizes = np.array(part.shard_sequences, dtype=np.int64)
        key = (*self._key, part.source, pass_number)
        found = self._windows.get((source, pass_number))
        if found is None:
            shards = permute(np.arange(len(sizes)), len(sizes), key=(*key, "shards"))
            ends = np.cumsum(sizes[shards])
            starts = ends - sizes[shards]
            # A shuffle window is the shards that begin within it.
            begins = starts[np.flatnonzero(np.diff(starts // part.window, prepend=-1))]
            found = Windows(shards, ends, np.append(begins, ends[-1]))
            # Neighbouring steps ask for the same pass, or for two around its end.
            self._windows = {k: kept for k, kept in self._windows.items() if k[1] >= pass_number - 1}
            self._windows[source, pass_number] = found
        windows = np.searchsorted(found.begins, positions, side="right") - 1  # [n]
        mixed = np.empty_like(positions)
        for window in np.unique(windows).tolist():
            here, (begin, end) = windows == window, found.begins[window : window + 2].tolist()
            mixed[here] = begin + permute(positions[here] - begin, end - begin, key=(*key, window))
        nth = np.searchsorted(found.ends, mixed, side="right")  # index of the shard in the order of the pass
        shards = found.shards[nth]
        # A sequence is as far from its shard's end in storage as in the pass.
        return np.cumsum(sizes)[shards] - (found.ends[nth] - mixed)


def source_parts(bucket: Bucket, window_tokens: int) -> tuple[SourcePart, ...]:
    """Return each source's part of a bucket, with the windows of all sources about `window_tokens` tokens together."""
    parts = []
    for part in bucket.parts:
        shards = bucket.shards[: part.first_shard + part.num_shards]["sequences"]
        # The source's part of a window, in sequences.
        window = -(-window_tokens * part.sequences // max(1, bucket.tokens))
        parts.append(
            SourcePart(
                source=part.source,
                first_sequence=int(shards[: part.first_shard].sum()),
                shard_sequences=tuple(shards[part.first_shard :].tolist()),
                window=window if window < part.sequences else 0,
            )
        )
    return tuple(parts)
