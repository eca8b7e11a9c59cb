"""The order of training: which sequences each step, micro-step and replica reads, by arithmetic alone.

A bucket's sequences form an endless stream: pass p over its N sequences is a permutation keyed by (seed, bucket, p).
The c-th batch of the bucket takes the next n stream positions, so a batch may straddle two passes and every sequence
comes exactly once in each. Nothing is remembered: a step's batch is the same on any number of replicas, after any
restart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .manifest import Manifest
from .permutation import permute


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What the steps of a run have taken from one bucket: `tokens` = `reached_tokens` + `repeated_tokens`."""

    length: int
    sequences: int
    """Sequences trained on, repetitions included."""

    passes: float
    """The same as a multiple of the bucket's sequences."""

    reached_tokens: int
    """Tokens of distinct sequences trained on."""

    not_reached_tokens: int
    """Tokens of the bucket not trained on yet; with `reached_tokens` they make the whole bucket."""

    @property
    def tokens(self) -> int:
        """Tokens trained on, repetitions included."""
        return self.sequences * self.length

    @property
    def repeated_tokens(self) -> int:
        """Tokens trained on for the second time or later."""
        return self.tokens - self.reached_tokens


class BatchOrder:
    """Which sequences make each step's global batch.

    `lengths` and `sequences` are the buckets' lengths in tokens and numbers of sequences, `schedule` the bucket of
    every step (see curriculum.schedule). Every global batch has `global_batch_tokens` tokens of one length.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        sequences: Sequence[int],
        schedule: NDArray[np.int64],
        global_batch_tokens: int,
        seed: int,
    ):
        if global_batch_tokens < 1 or global_batch_tokens % max(lengths):
            raise ValueError(
                f"train.global_batch_tokens is {global_batch_tokens} and data.max_bucket_tokens is {max(lengths)}; "
                "the first must be a multiple of the second"
            )
        for bucket in np.unique(schedule):
            if not sequences[bucket]:
                raise ValueError(f"the schedule asks for bucket {lengths[bucket]}, which has no sequences")
        self.lengths = tuple(lengths)
        self.schedule = schedule
        self._sequences = tuple(sequences)
        self._global_batch_tokens = global_batch_tokens
        self._seed = seed
        # How many earlier steps chose the same bucket.
        self._earlier = np.empty(len(schedule), dtype=np.int64)
        for bucket in range(len(lengths)):
            chosen = np.flatnonzero(schedule == bucket)
            self._earlier[chosen] = np.arange(len(chosen))

    def bucket(self, step: int) -> int:
        """Return the number of the bucket that `step` trains on; its length is `lengths[bucket]`."""
        return int(self.schedule[step])

    def batch_sequences(self, step: int) -> int:
        """Return how many sequences the step's global batch has."""
        return self._global_batch_tokens // self.lengths[self.bucket(step)]

    def sequences(
        self, step: int, micro_step: int, replica: int, num_replicas: int, sequences_per_replica: int
    ) -> NDArray[np.int64]:
        """Return the bucket's sequences that one replica reads in one micro-step: [sequences_per_replica].

        Micro-steps, replicas and rows, in this order of significance, run through the global batch, whatever their
        numbers. Raises ValueError unless they divide it, IndexError outside it.
        """
        batch = self.batch_sequences(step)
        per_micro_step = num_replicas * sequences_per_replica
        if batch % per_micro_step:
            raise ValueError(
                f"train.global_batch_tokens = {self._global_batch_tokens} makes {batch} sequences of step {step}; "
                f"{num_replicas} replicas with {sequences_per_replica} sequences each do not divide them"
            )
        if not (0 <= replica < num_replicas and 0 <= micro_step < batch // per_micro_step):
            raise IndexError(
                f"replica {replica} of {num_replicas}, micro-step {micro_step} of {batch // per_micro_step}"
            )
        first = int(self._earlier[step]) * batch + micro_step * per_micro_step + replica * sequences_per_replica
        return self._at(self.bucket(step), np.arange(first, first + sequences_per_replica))

    def trained(self, step: int) -> tuple[Trained, ...]:
        """Return, for each bucket, what the steps before `step` have trained on."""
        taken = np.bincount(self.schedule[:step], minlength=len(self.lengths)).tolist()
        entries = []
        for length, available, steps in zip(self.lengths, self._sequences, taken, strict=True):
            sequences = steps * (self._global_batch_tokens // length)
            reached = min(sequences, available)
            entries.append(
                Trained(
                    length=length,
                    sequences=sequences,
                    passes=sequences / available if available else 0.0,
                    reached_tokens=reached * length,
                    not_reached_tokens=(available - reached) * length,
                )
            )
        return tuple(entries)

    def _at(self, bucket: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sequences at stream `positions` of the bucket; same shape."""
        passes, places = np.divmod(positions, self._sequences[bucket])
        result = np.empty_like(positions)
        for pass_number in np.unique(passes).tolist():
            here = passes == pass_number
            result[here] = permute(places[here], self._sequences[bucket], key=(self._seed, bucket, pass_number))
        return result


class Batches:
    """The train split of prepared data, read in a BatchOrder."""

    def __init__(
        self,
        directory: str | Path,
        manifest: Manifest,
        schedule: NDArray[np.int64],
        global_batch_tokens: int,
        seed: int,
    ):
        buckets = manifest.splits["train"]
        self.order = BatchOrder(
            [bucket.length for bucket in buckets],
            [bucket.sequences for bucket in buckets],
            schedule,
            global_batch_tokens,
            seed,
        )
        self._readers = [manifest.reader(Path(directory), bucket) for bucket in buckets]

    def read(
        self, step: int, micro_step: int, replica: int, num_replicas: int, sequences_per_replica: int
    ) -> NDArray[np.int64]:
        """Return one replica's rows of one micro-step: int64 [sequences_per_replica, length + 1].

        Inputs are [:, :-1], targets [:, 1:]; every row is one document's. Arguments and errors as BatchOrder.sequences.
        """
        indices = self.order.sequences(step, micro_step, replica, num_replicas, sequences_per_replica)
        return self._readers[self.order.bucket(step)].read(indices)
