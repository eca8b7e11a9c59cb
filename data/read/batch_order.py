"""The order of training: which sequences each step, micro-step and replica reads, by arithmetic alone.

A bucket's sequences form an endless stream. Pass p over it has M positions, of which each source s takes M_s. They are
divided into G windows: window w takes of each source the next floor((w+1) M_s / G) - floor(w M_s / G) of its own
endless stream and mixes them by a permutation keyed by (seed, bucket, p, w). The c-th batch of the bucket takes the
next n positions. Nothing is remembered: a step's batch is the same on any number of replicas, after any restart.

With one source, or sources without weights, M_s is the number of the source's sequences and every sequence comes
exactly once in each pass. With weights, M_s is in proportion to weight, and a source's own passes follow each other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..format.manifest import Bucket
from ..permutation import permute

BLOCK_POSITIONS = 1 << 12
"""The order is worked out for so many positions of the stream at a time: numpy's overhead of some 0.2 ms then serves
several steps, and a rank of a large world, which needs few of them, loses less than a millisecond."""
KEPT_BLOCKS = 4


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What the steps of a run have taken from one bucket."""

    length: int
    sequences: int
    """Sequences trained on, repetitions included."""

    passes: float
    """The same as a multiple of the positions of a pass."""

    tokens: int
    """Tokens trained on, repetitions included."""

    reached_tokens: int
    """Tokens of distinct sequences trained on."""

    not_reached_tokens: int
    """Tokens of the bucket not trained on yet; with `reached_tokens` they make the whole bucket."""

    @property
    def repeated_tokens(self) -> int:
        """Tokens trained on for the second time or later."""
        return self.tokens - self.reached_tokens


class Share(NamedTuple):
    """Which part of every micro-batch a rank reads: `sequences` of the length at hand, for `replica`."""

    replica: int
    num_replicas: int
    sequences: int


@dataclass(frozen=True, kw_only=True)
class SourcePart:
    """One source's part of a bucket: its shards, in order, and its positions in a pass."""

    first_sequence: int
    shard_sequences: tuple[int, ...]
    positions: int

    @cached_property
    def sequences(self) -> int:
        """Number of sequences; there may be 10^5 shards to sum."""
        return sum(self.shard_sequences)


class BucketOrder:
    """A bucket's endless stream: position -> sequence."""

    def __init__(self, parts: Sequence[SourcePart], windows: int, key: tuple[int, ...]):
        self.parts = tuple(parts)
        self.positions = sum(part.positions for part in parts)
        """Positions in a pass."""
        self._windows = max(1, min(windows, self.positions))
        self._key = key
        # [source, window]: where each window begins in the source's part of a pass; and in the pass itself.
        self._begins = np.array(
            [[part.positions * window // self._windows for window in range(self._windows + 1)] for part in self.parts],
            dtype=np.int64,
        )
        self._first = self._begins.sum(axis=0)
        self._blocks: dict[int, NDArray[np.int64]] = {}
        self._shard_orders: dict[tuple[int, int], tuple[NDArray, NDArray, NDArray]] = {}

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sequences at stream `positions` [n] of the bucket, numbered as its reader does: [n]."""
        numbers, inside = np.divmod(positions, BLOCK_POSITIONS)
        result = np.empty_like(positions)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            result[here] = self._block(number)[inside[here]]
        return result

    def _block(self, number: int) -> NDArray[np.int64]:
        if number not in self._blocks:
            block = self._worked_out(number * BLOCK_POSITIONS + np.arange(BLOCK_POSITIONS))
            kept = list(self._blocks.items())[1 - KEPT_BLOCKS :]
            self._blocks = dict([*kept, (number, block)])
        return self._blocks[number]

    def _worked_out(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        passes, places = np.divmod(positions, self.positions)
        windows = np.searchsorted(self._first, places, side="right") - 1
        result = np.empty_like(positions)
        for run in _runs(passes, windows):
            result[run] = self._in_window(int(passes[run[0]]), int(windows[run[0]]), places[run])
        return result

    def _in_window(self, pass_number: int, window: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        sources, inside = self._mixed(pass_number, window, places)
        result = np.empty_like(places)
        for source in np.unique(sources).tolist():
            here = sources == source
            result[here] = self._own(source, pass_number * self.parts[source].positions + inside[here])
        return result

    def _mixed(
        self, pass_number: int, window: int, places: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the source of each place of a pass, and which position of the source's part of the pass it is."""
        first, last = int(self._first[window]), int(self._first[window + 1])
        mixed = permute(places - first, last - first, key=(*self._key, pass_number, window))
        begins, ends = self._begins[:, window], self._begins[:, window + 1]
        # The window's positions are numbered source after source.
        offsets = np.cumsum(ends - begins)
        sources = np.searchsorted(offsets, mixed, side="right")
        return sources, mixed - (offsets - (ends - begins))[sources] + begins[sources]

    def _own(self, source: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sequences at positions of a source's own endless stream, of which each pass has its own order."""
        part = self.parts[source]
        if self._windows == 1 and part.positions == part.sequences:
            # The one window mixes just this pass of the source: another shuffle would change nothing.
            return part.first_sequence + positions % part.sequences
        passes, places = np.divmod(positions, part.sequences)
        result = np.empty_like(positions)
        for pass_number in np.unique(passes).tolist():
            here = passes == pass_number
            if self._windows == 1:
                mixed = permute(places[here], part.sequences, key=(*self._key, pass_number, "source", source))
                result[here] = part.first_sequence + mixed
            else:
                order, ends, firsts = self._shards(source, pass_number)
                place = np.searchsorted(ends, places[here], side="right")
                result[here] = firsts[order[place]] + places[here] - ends[place - 1] * (place > 0)
        return result

    def _shards(self, source: int, pass_number: int) -> tuple[NDArray, NDArray, NDArray]:
        """Return the source's shards in a pass's order, where each ends in it, and every shard's first sequence."""
        if (source, pass_number) not in self._shard_orders:
            sizes = np.array(self.parts[source].shard_sequences, dtype=np.int64)
            order = permute(np.arange(len(sizes)), len(sizes), key=(*self._key, pass_number, "shards", source))
            firsts = self.parts[source].first_sequence + np.cumsum(sizes) - sizes
            # Neighbouring steps ask for the same pass, or for two around its end.
            self._shard_orders = {
                known: entry for known, entry in self._shard_orders.items() if known[1] >= pass_number - 1
            } | {(source, pass_number): (order, np.cumsum(sizes[order]), firsts)}
        return self._shard_orders[source, pass_number]

    def reached(self, positions: int) -> int:
        """Return how many distinct sequences the first `positions` of the stream have."""
        if all(part.positions == part.sequences for part in self.parts):
            return min(positions, self.positions)
        passes, places = divmod(positions, self.positions) if self.positions else (0, 0)
        window = int(np.searchsorted(self._first, places, side="right")) - 1
        here = np.arange(self._first[window], places)
        sources, inside = self._mixed(passes, window, here) if len(here) else (here, here)
        total = 0
        for source, part in enumerate(self.parts):
            # Of its own stream the source has given a whole beginning, and some of what the window takes of it.
            before = passes * part.positions
            begin, end = (before + int(self._begins[source, window + side]) for side in (0, min(1, len(here))))
            some = before + inside[sources == source]
            if begin < part.sequences < end:
                total += len(np.unique(self._own(source, np.concatenate([np.arange(begin), some]))))
            else:
                total += min(begin + len(some), part.sequences)
        return total


def _runs(passes: NDArray[np.int64], windows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Return the places of each (pass, window) among ascending positions."""
    if not len(passes):
        return []
    cuts = np.flatnonzero((np.diff(passes) != 0) | (np.diff(windows) != 0)) + 1
    return np.split(np.arange(len(passes)), cuts)


def bucket_orders(
    buckets: Sequence[Bucket], weights: Mapping[str, float], window_tokens: int, seed: int
) -> tuple[BucketOrder, ...]:
    """Return each bucket's order. `weights` are the sources' shares of all tokens, empty for their own.

    Raises ValueError unless the weights name just the sources that have sequences.
    """
    names = [part.source for part in buckets[0].parts]
    tokens = {name: sum(b.length * b.parts[index].sequences for b in buckets) for index, name in enumerate(names)}
    if weights and weights.keys() != (filled := {name for name in names if tokens[name]}):
        raise ValueError(
            f"curriculum.weights names {', '.join(sorted(weights))}, and the sources with training data are "
            f"{', '.join(sorted(filled))}; give each of them a weight, or none"
        )
    total = sum(tokens.values())
    # How often a sequence of the source comes in a pass, on average.
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


class BatchOrder:
    """The sequences of each step's global batch; steps count from 1.

    `lengths` are the buckets' in tokens, `step_buckets` [steps] the bucket of every step (see
    `curriculum.step_buckets`). Every global batch has `global_batch_tokens` tokens of one length.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        orders: Sequence[BucketOrder],
        step_buckets: NDArray[np.uint8],
        global_batch_tokens: int,
    ):
        if global_batch_tokens < 1 or global_batch_tokens % max(lengths):
            raise ValueError(
                f"train.global_batch_tokens is {global_batch_tokens} and data.max_bucket_tokens is {max(lengths)}; "
                "the first must be a multiple of the second"
            )
        for bucket in np.unique(step_buckets):
            if not orders[bucket].positions:
                raise ValueError(f"the curriculum asks for bucket {lengths[bucket]}, which has no sequences")
        self.lengths = tuple(lengths)
        self.step_buckets = step_buckets
        self._orders = tuple(orders)
        self._global_batch_tokens = global_batch_tokens
        # [steps]: number of earlier steps that train on the same bucket.
        self._earlier = np.empty(len(step_buckets), dtype=np.int64)
        for bucket in range(len(lengths)):
            chosen = np.flatnonzero(step_buckets == bucket)
            self._earlier[chosen] = np.arange(len(chosen))

    def bucket(self, step: int) -> int:
        """Return the index of the bucket that `step` trains on; its length is `lengths[bucket]`.

        Raises IndexError unless `step` is in 1, ..., steps.
        """
        if not 1 <= step <= len(self.step_buckets):
            raise IndexError(f"step = {step}: must be in 1, ..., {len(self.step_buckets)}")
        return int(self.step_buckets[step - 1])

    def batch_sequences(self, step: int) -> int:
        """Return the number of sequences in the global batch of `step`, counted from 1."""
        return self._global_batch_tokens // self.lengths[self.bucket(step)]

    def sequences(self, step: int, share: Share) -> NDArray[np.int64]:
        """Return the bucket's sequences that one replica reads in `step`, int64 [micro-steps, share.sequences].

        Micro-steps, replicas and rows, in this order of significance, run through the global batch, whatever their
        numbers. Raises ValueError unless they divide it, IndexError for a step or replica outside the run.
        """
        batch = self.batch_sequences(step)
        per_micro_step = share.num_replicas * share.sequences
        if batch % per_micro_step:
            raise ValueError(
                f"train.global_batch_tokens = {self._global_batch_tokens} makes {batch} sequences of step {step}; "
                f"{share.num_replicas} replicas with {share.sequences} sequences each do not divide them"
            )
        if not 0 <= share.replica < share.num_replicas:
            raise IndexError(f"replica {share.replica} of {share.num_replicas}")
        micro_steps = np.arange(batch // per_micro_step)[:, None] * per_micro_step
        places = micro_steps + share.replica * share.sequences + np.arange(share.sequences)
        positions = int(self._earlier[step - 1]) * batch + places
        return self._orders[self.bucket(step)].at(positions.ravel()).reshape(places.shape)

    def trained(self, steps_done: int) -> tuple[Trained, ...]:
        """Return, for each bucket, what the first `steps_done` steps have trained on."""
        taken = np.bincount(self.step_buckets[:steps_done], minlength=len(self.lengths)).tolist()
        entries = []
        for length, order, steps in zip(self.lengths, self._orders, taken, strict=True):
            sequences = steps * (self._global_batch_tokens // length)
            available = sum(part.sequences for part in order.parts)
            reached = order.reached(sequences)
            entries.append(
                Trained(
                    length=length,
                    sequences=sequences,
                    passes=sequences / order.positions if order.positions else 0.0,
                    tokens=sequences * length,
                    reached_tokens=reached * length,
                    not_reached_tokens=(available - reached) * length,
                )
            )
        return tuple(entries)


def bucket_tokens(lengths: Sequence[int], orders: Sequence[BucketOrder]) -> list[int]:
    """Return the tokens of a pass over each bucket, by which the curriculum divides a run's steps."""
    return [length * order.positions for length, order in zip(lengths, orders, strict=True)]
