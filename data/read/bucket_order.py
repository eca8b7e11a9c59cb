"""The endless stream of one bucket, from which the steps that train on the bucket take their sequences.

A pass over the stream has M positions, of which source s takes M_s, and G shuffle windows. Window w of pass p takes the
next floor((w+1) M_s / G) - floor(w M_s / G) sequences of each source's own endless stream and mixes them by a
permutation keyed by (seed, bucket, p, w).

Without weights M_s is the number of the source's sequences, and every sequence comes exactly once in each pass. With
weights M_s is in proportion to the weight, and the passes of a source follow each other independently of the bucket's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..format.bucket import Bucket
from ..permutation import permute

POSITIONS_AT_ONCE = 1 << 12
"""Number of stream positions whose sequences are computed at once: numpy's overhead of some 0.2 ms then serves several
steps, and a rank of a large world, which needs few of the positions, loses less than a millisecond."""
KEPT_RANGES = 4
"""Number of most recently computed ranges of positions to keep."""


@dataclass(frozen=True, kw_only=True)
class SourcePart:
    """One source's part of a bucket."""

    first_sequence: int
    """Index in the bucket of the source's first sequence; its others follow."""
    shard_sequences: tuple[int, ...]
    """Number of sequences in each of the source's shards, in order."""
    positions: int
    """Number of positions in a pass over the bucket that the source takes."""

    @cached_property
    def sequences(self) -> int:
        """Number of the source's sequences; kept, as a source may have 10^5 shards."""
        return sum(self.shard_sequences)


class BucketOrder:
    """The endless stream of one bucket: a function from positions in the stream to sequences.

    `windows` is the number of shuffle windows in a pass; `key` identifies the bucket and the run's seed.
    """

    def __init__(self, parts: Sequence[SourcePart], windows: int, key: tuple[int, ...]):
        self.parts = tuple(parts)
        self.positions = sum(part.positions for part in parts)
        """Positions in a pass."""
        self._windows = max(1, min(windows, self.positions))
        self._key = key
        # [source, shuffle window + 1]: the position in the source's part of a pass at which each window begins.
        self._source_begins = np.array(
            [[part.positions * window // self._windows for window in range(self._windows + 1)] for part in self.parts],
            dtype=np.int64,
        )
        # [shuffle window + 1]: the same position in the whole pass.
        self._begins = self._source_begins.sum(axis=0)
        self._ranges: dict[int, NDArray[np.int64]] = {}
        self._shard_orders: dict[tuple[int, int], tuple[NDArray, NDArray, NDArray]] = {}

    def is_stream_of(self, other: "BucketOrder") -> bool:
        """Return whether both streams have the same parameters, and so the same sequences at all positions."""
        return (self.parts, self._windows, self._key) == (other.parts, other._windows, other._key)

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sequences at stream `positions` [n], as indices into the bucket, int64 [n]."""
        ranges, offsets = np.divmod(positions, POSITIONS_AT_ONCE)
        result = np.empty_like(positions)
        for number in np.unique(ranges).tolist():
            here = ranges == number
            result[here] = self._range(number)[offsets[here]]
        return result

    def _range(self, number: int) -> NDArray[np.int64]:
        """Return the sequences at the `number`-th range of POSITIONS_AT_ONCE stream positions, int64 [positions]."""
        # Two threads may compute the same range; each returns what it found, whatever the other keeps.
        found = self._ranges.get(number)
        if found is None:
            found = self._compute(number * POSITIONS_AT_ONCE + np.arange(POSITIONS_AT_ONCE))
            # A dict keeps the order of insertion, so the oldest range is left out.
            kept = list(self._ranges.items())[1 - KEPT_RANGES :]
            self._ranges = dict([*kept, (number, found)])
        return found

    def _compute(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sequences at ascending stream `positions` [n], shape [n]."""
        passes, in_pass = np.divmod(positions, self.positions)
        windows = np.searchsorted(self._begins, in_pass, side="right") - 1
        result = np.empty_like(positions)
        # Positions ascend, so those of one (pass, shuffle window) are adjacent and share one permutation.
        for run in _runs(passes, windows):
            result[run] = self._in_shuffle_window(int(passes[run[0]]), int(windows[run[0]]), in_pass[run])
        return result

    def _in_shuffle_window(self, pass_number: int, window: int, in_pass: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sequences at positions `in_pass` [n] of a pass, all of one shuffle window, shape [n]."""
        sources, in_source = self._mixed(pass_number, window, in_pass)
        result = np.empty_like(in_pass)
        for source in np.unique(sources).tolist():
            here = sources == source
            # A source's stream is endless too: every pass of the bucket takes its next `positions`.
            result[here] = self._from_source(source, pass_number * self.parts[source].positions + in_source[here])
        return result

    def _mixed(
        self, pass_number: int, window: int, in_pass: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the source at positions `in_pass` [n] of a pass, and the position in that source's part of the pass.

        All positions are in shuffle window `window`. Both results are int64 [n].
        """
        first, last = int(self._begins[window]), int(self._begins[window + 1])
        mixed = permute(in_pass - first, last - first, key=(*self._key, pass_number, window))
        begins, ends = self._source_begins[:, window], self._source_begins[:, window + 1]  # [source]
        # Before the permutation the sources of a shuffle window lie one after another; `offsets` are their ends.
        offsets = np.cumsum(ends - begins)
        sources = np.searchsorted(offsets, mixed, side="right")
        return sources, mixed - (offsets - (ends - begins))[sources] + begins[sources]

    def _from_source(self, source: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sequences at `positions` [n] of a source's own endless stream; each of its passes is shuffled."""
        part = self.parts[source]
        if self._windows == 1 and part.positions == part.sequences:
            # The only shuffle window already mixes exactly this pass of the source: a second shuffle adds nothing.
            return part.first_sequence + positions % part.sequences
        passes, in_pass = np.divmod(positions, part.sequences)
        result = np.empty_like(positions)
        for pass_number in np.unique(passes).tolist():
            here = passes == pass_number
            if self._windows == 1:
                mixed = permute(in_pass[here], part.sequences, key=(*self._key, pass_number, "source", source))
                result[here] = part.first_sequence + mixed
            else:
                # With several shuffle windows only whole shards are permuted, so that a window reads few shards.
                order, ends, firsts = self._shards(source, pass_number)
                nth = np.searchsorted(ends, in_pass[here], side="right")
                result[here] = firsts[order[nth]] + in_pass[here] - ends[nth - 1] * (nth > 0)
        return result

    def _shards(self, source: int, pass_number: int) -> tuple[NDArray, NDArray, NDArray]:
        """Return a source's shards in the order of one pass, their ends in the pass, and their first sequences.

        All three are int64 [shards]; the first two follow the order of the pass, the last one is indexed by shard.
        """
        found = self._shard_orders.get((source, pass_number))
        if found is None:
            sizes = np.array(self.parts[source].shard_sequences, dtype=np.int64)
            order = permute(np.arange(len(sizes)), len(sizes), key=(*self._key, pass_number, "shards", source))
            firsts = self.parts[source].first_sequence + np.cumsum(sizes) - sizes
            found = order, np.cumsum(sizes[order]), firsts
            # Neighbouring steps ask for the same pass, or for two around its end.
            self._shard_orders = {
                known: entry for known, entry in self._shard_orders.items() if known[1] >= pass_number - 1
            } | {(source, pass_number): found}
        return found

    def reached(self, positions: int) -> int:
        """Return the number of distinct sequences among the first `positions` positions of the stream."""
        if all(part.positions == part.sequences for part in self.parts):
            return min(positions, self.positions)
        passes, in_pass = divmod(positions, self.positions) if self.positions else (0, 0)
        window = int(np.searchsorted(self._begins, in_pass, side="right")) - 1
        here = np.arange(self._begins[window], in_pass)
        sources, in_source = self._mixed(passes, window, here) if len(here) else (here, here)
        total = 0
        for source, part in enumerate(self.parts):
            # The source has given all positions of its stream before `begin`, and the positions `some` of the shuffle
            # window that is not complete, all of them before `end`.
            before = passes * part.positions
            begin, end = (before + int(self._source_begins[source, window + side]) for side in (0, min(1, len(here))))
            some = before + in_source[sources == source]
            if begin < part.sequences < end:
                # The source's first pass ends inside this window: only counting tells which sequences come twice.
                total += len(np.unique(self._from_source(source, np.concatenate([np.arange(begin), some]))))
            else:
                total += min(begin + len(some), part.sequences)
        return total


def _runs(passes: NDArray[np.int64], windows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Return the indices of each (pass, shuffle window) among ascending positions."""
    if not len(passes):
        return []
    cuts = np.flatnonzero((np.diff(passes) != 0) | (np.diff(windows) != 0)) + 1
    return np.split(np.arange(len(passes)), cuts)


def bucket_orders(
    buckets: Sequence[Bucket], weights: Mapping[str, float], window_tokens: int, seed: int
) -> tuple[BucketOrder, ...]:
    """Return the order of each bucket.

    `weights` are the sources' shares of all tokens; without any, a source's share is its own size. A shuffle window has
    about `window_tokens` tokens; 0: the whole bucket. Raises ValueError unless the weights name exactly the sources
    that have sequences.
    """
    names = [part.source for part in buckets[0].parts]
    tokens = {name: sum(b.length * b.parts[index].sequences for b in buckets) for index, name in enumerate(names)}
    if weights and weights.keys() != (filled := {name for name in names if tokens[name]}):
        raise ValueError(
            f"curriculum.weights = {dict(sorted(weights.items()))}: the sources with training data are "
            f"{', '.join(sorted(filled))}; give a weight to each of them and to no other, or remove all weights"
        )
    total = sum(tokens.values())
    # Average number of times that a sequence of the source comes in one pass over its bucket.
    repeats = {name: weight / sum(weights.values()) * total / tokens[name] for name, weight in weights.items()}
    orders = []
    for number, bucket in enumerate(buckets):
        parts = []
        for part in bucket.parts:
            shards = bucket.shards[: part.first_shard + part.num_shards]["sequences"]
            parts.append(
                SourcePart(
                    first_sequence=int(shards[: part.first_shard].sum()),
                    shard_sequences=tuple(shards[part.first_shard :].tolist()),
                    positions=round(part.sequences * repeats.get(part.source, 1.0)),
                )
            )
        windows = sum(part.positions for part in parts) * bucket.length // window_tokens if window_tokens else 1
        orders.append(BucketOrder(parts, windows, (seed, number)))
    return tuple(orders)


def bucket_tokens(lengths: Sequence[int], orders: Sequence[BucketOrder]) -> list[int]:
    """Return the number of tokens in a pass over each bucket; the curriculum divides a run's steps in proportion."""
    return [length * order.positions for length, order in zip(lengths, orders, strict=True)]
