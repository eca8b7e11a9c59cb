"""The order of training: the sequences that each step, micro-step and replica reads, by arithmetic alone.

Every bucket has an endless stream of sequences (`bucket_order.py`), and the c-th batch of the bucket takes its next n
positions. There is no state: a step's batch is the same for any number of replicas and after any restart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .bucket_order import BucketOrder


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The part of one bucket that the steps of a run have trained on."""

    length: int
    """Tokens of each sequence of the bucket."""

    sequences: int
    """Sequences trained on, repetitions included."""

    passes: float
    """`sequences` divided by the number of positions in a pass."""

    tokens: int
    """Tokens trained on, repetitions included."""

    reached_tokens: int
    """Tokens of distinct sequences trained on."""

    not_reached_tokens: int
    """Tokens of the bucket not trained on yet; `reached_tokens` and these add up to the whole bucket."""

    @property
    def repeated_tokens(self) -> int:
        """Tokens trained on for the second time or later."""
        return self.tokens - self.reached_tokens


class ReplicaShare(NamedTuple):
    """Share of every micro-batch of one length that the ranks of one replica read."""

    replica: int
    """Index of the rank's replica."""
    num_replicas: int
    sequences: int
    """Number of sequences that each replica reads."""


class BatchOrder:
    """Order of a run: the sequences of each step's global batch; steps count from 1.

    `lengths` are the buckets' in tokens, `step_buckets` [steps] the bucket of every step (see
    `curriculum.step_buckets`). Every global batch has `global_batch_tokens` tokens of one length. Raises ValueError
    unless that is a multiple of the longest bucket and every bucket of the curriculum has sequences.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        orders: Sequence[BucketOrder],
        step_buckets: NDArray[np.uint8],
        global_batch_tokens: int,
    ):
        if global_batch_tokens < 1 or global_batch_tokens % max(lengths):
            next_multiple = max(1, -(-global_batch_tokens // max(lengths))) * max(lengths)
            raise ValueError(
                f"train.global_batch_tokens = {global_batch_tokens}: must be a positive multiple of the longest "
                f"bucket, {max(lengths)} tokens; set it to {next_multiple}"
            )
        for bucket in np.unique(step_buckets):
            if not orders[bucket].positions:
                raise ValueError(
                    f"step_buckets: bucket {lengths[bucket]} has no sequences; give no step to it, or "
                    "prepare documents that fill it"
                )
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

    def sequences(self, step: int, share: ReplicaShare) -> NDArray[np.int64]:
        """Return the bucket's sequences that one replica reads in `step`, int64 [micro-steps, share.sequences].

        The index into the global batch is (micro-step x replicas + replica) x share.sequences + row, so that the batch
        is the same for any division. Raises ValueError unless replicas x share.sequences divides the global batch, and
        IndexError for a step or replica outside the run.
        """
        batch = self.batch_sequences(step)
        per_micro_step = share.num_replicas * share.sequences
        if batch % per_micro_step:
            raise ValueError(
                f"train.global_batch_tokens = {self._global_batch_tokens}: makes {batch} sequences of step {step}, "
                f"which {share.num_replicas} replicas with {share.sequences} sequences each do not divide; set it to a "
                f"multiple of {per_micro_step * self.lengths[self.bucket(step)]}"
            )
        if not 0 <= share.replica < share.num_replicas:
            raise IndexError(f"replica = {share.replica}: must be in 0, ..., {share.num_replicas - 1}")
        micro_steps = np.arange(batch // per_micro_step)[:, None] * per_micro_step
        in_batch = micro_steps + share.replica * share.sequences + np.arange(share.sequences)  # [micro-step, row]
        positions = int(self._earlier[step - 1]) * batch + in_batch
        return self._orders[self.bucket(step)].at(positions.ravel()).reshape(positions.shape)

    def first_difference(self, other: "BatchOrder", last: int) -> int | None:
        """Return the first of steps 1 to `last` whose global batches differ between two orders of the same data.

        None means that all are equal. Both orders have at least `last` steps and global batches of one size.
        """
        ours, theirs = self.step_buckets[:last], other.step_buckets[:last]
        unlike = np.flatnonzero(ours != theirs)
        first = int(unlike[0]) + 1 if len(unlike) else last + 1
        # Before `first` both take the same number of batches from each bucket, so equal streams give equal batches.
        streams = zip(self._orders, other._orders, strict=True)
        differing = [bucket for bucket, (a, b) in enumerate(streams) if not a.is_stream_of(b)]
        for index in np.flatnonzero(np.isin(ours[: first - 1], differing)).tolist():
            whole = ReplicaShare(0, 1, self.batch_sequences(index + 1))
            if not np.array_equal(self.sequences(index + 1, whole), other.sequences(index + 1, whole)):
                return index + 1
        return first if first <= last else None

    def trained(self, steps_done: int) -> tuple[Trained, ...]:
        """Return the part of each bucket that the first `steps_done` steps train on."""
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
