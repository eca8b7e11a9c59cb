"""The order of training: the sequences that each step, micro-step and replica reads, by arithmetic alone.

Every slot of a step trains on one bucket (`curriculum.py`). A bucket has an endless stream of sequences
(`bucket_order.py`), and its c-th slot takes the next n positions. There is no state: a step's batch is the same for any
number of replicas and after any restart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .bucket_order import BucketOrder

ORDER = 3
"""Version of the order: one more with every change after which the same settings and data give other batches. A run
continues in the order that it began with; checkpoints that name no version have order 1."""

STRIDE = 256
"""Number of steps between those for which the earlier slots of each bucket are kept."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The part of one cell, the sequences of a source in a bucket, that the steps of a run have trained on."""

    source: str
    """Name of the source."""
    length: int
    """Tokens of each sequence."""
    sequences: int
    """Sequences trained on, repetitions included."""
    available: int
    """Sequences of the cell."""

    @property
    def passes(self) -> float:
        """Number of passes over the cell."""
        return self.sequences / self.available if self.available else 0.0

    @property
    def tokens(self) -> int:
        """Tokens trained on, repetitions included."""
        return self.sequences * self.length

    @property
    def reached_tokens(self) -> int:
        """Tokens of distinct sequences trained on: no sequence comes again before all others of its cell have come."""
        return min(self.sequences, self.available) * self.length

    @property
    def repeated_tokens(self) -> int:
        """Tokens trained on for the second time or later."""
        return self.tokens - self.reached_tokens

    @property
    def not_reached_tokens(self) -> int:
        """Tokens of the cell not trained on yet; `reached_tokens` and these add up to the whole cell."""
        return self.available * self.length - self.reached_tokens


class ReplicaShare(NamedTuple):
    """Share of every micro-batch of one length that the ranks of one replica read."""

    replica: int
    """Index of the rank's replica."""
    num_replicas: int
    sequences: int
    """Number of sequences that each replica reads."""


class Stretch(NamedTuple):
    """Adjacent positions of one bucket's stream that a step trains on."""

    bucket: int
    """Index of the bucket."""
    first: int
    """First position."""
    sequences: int
    """Number of positions."""


class BatchOrder:
    """Order of a run: the sequences of each step's global batch; steps count from 1.

    `lengths` are those of the buckets in use, in tokens, ascending. `slots` [steps, slots of a step] is the bucket of
    every slot, in any order within a step; each slot has `slot_tokens` tokens. Every bucket with slots has sequences.
    """

    def __init__(
        self, lengths: Sequence[int], orders: Sequence[BucketOrder], slots: NDArray[np.uint8], slot_tokens: int
    ):
        self.lengths = tuple(lengths)
        self.orders = tuple(orders)
        self.slots = slots
        self.slot_tokens = slot_tokens
        # [steps / STRIDE, buckets]: slots of each bucket before every STRIDE-th step.
        counts = [self._count(slots[first : first + STRIDE]) for first in range(0, len(slots), STRIDE)]
        self._earlier = np.cumsum(counts, axis=0) - counts

    def _count(self, slots: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return the number of `slots`, of any shape, that each bucket has, [buckets]."""
        return np.bincount(slots.ravel(), minlength=len(self.lengths))

    @property
    def batch_tokens(self) -> int:
        """Tokens of every global batch."""
        return self.slots.shape[1] * self.slot_tokens

    def slots_before(self, step: int) -> NDArray[np.int64]:
        """Return the number of slots that each bucket has in the steps before `step`, [buckets]."""
        # `step` may be one past the last: its stretch is then the last one.
        stretch = min((step - 1) // STRIDE, len(self._earlier) - 1)
        return self._earlier[stretch] + self._count(self.slots[stretch * STRIDE : step - 1])

    def batch(self, step: int) -> tuple[Stretch, ...]:
        """Return the global batch of `step`, the longest bucket first.

        Raises IndexError unless `step` is in 1, ..., steps.
        """
        if not 1 <= step <= len(self.slots):
            raise IndexError(f"step = {step}: must be in 1, ..., {len(self.slots)}; count the steps of the run from 1")
        before, here = self.slots_before(step).tolist(), self._count(self.slots[step - 1]).tolist()
        rows = [self.slot_tokens // length for length in self.lengths]  # [buckets]: sequences of a slot
        return tuple(
            Stretch(bucket, before[bucket] * rows[bucket], here[bucket] * rows[bucket])
            for bucket in reversed(range(len(rows)))
            if here[bucket]
        )

    def sequences(self, stretch: Stretch) -> NDArray[np.int64]:
        """Return the sequences of the bucket at a stretch, int64 [sequences]."""
        return self.orders[stretch.bucket].at(stretch.first + np.arange(stretch.sequences))

    def micro_batches(self, stretch: Stretch, share: ReplicaShare) -> NDArray[np.int64]:
        """Return the sequences at a stretch that one replica reads, int64 [micro-steps, share.sequences].

        The index into the stretch is (micro-step x replicas + replica) x share.sequences + row, so that a batch is the
        same for any division. Raises ValueError unless replicas x share.sequences divides a slot, and IndexError for a
        replica outside the run.
        """
        length, together = self.lengths[stretch.bucket], share.num_replicas * share.sequences
        if self.slot_tokens // length % together:
            raise ValueError(
                f"train.global_batch_tokens = {self.batch_tokens}: has slots of {self.slot_tokens} tokens, which "
                f"{share.num_replicas} replicas with {share.sequences} sequences of {length} tokens each do not "
                f"divide; set it to a multiple of {together * length}, and curriculum.slot_tokens as well if it is set"
            )
        if not 0 <= share.replica < share.num_replicas:
            raise IndexError(
                f"replica = {share.replica}: must be in 0, ..., {share.num_replicas - 1}; count the replicas of the "
                "run from 0"
            )
        micro_steps = np.arange(stretch.sequences // together)[:, None] * together  # [micro-step, 1]: first index
        # [micro-step, row]
        positions = stretch.first + micro_steps + share.replica * share.sequences + np.arange(share.sequences)
        return self.orders[stretch.bucket].at(positions.ravel()).reshape(positions.shape)

    def first_difference(self, other: "BatchOrder", last: int) -> int | None:
        """Return the first of steps 1 to `last` whose global batches differ between two orders of the same data.

        None means that all are equal. Both orders have at least `last` steps and global batches of one size.
        """
        tokens = self._tokens_by_length(last), other._tokens_by_length(last)
        lengths = sorted({*self.lengths, *other.lengths})
        none = np.zeros(last, dtype=np.int64)
        ours, theirs = (np.stack([one.get(length, none) for length in lengths]) for one in tokens)  # [lengths, steps]
        unlike = np.flatnonzero((ours != theirs).any(axis=0))
        first = int(unlike[0]) + 1 if len(unlike) else last + 1
        # Before `first` both take the same number of positions from each bucket, so equal streams give equal batches.
        for length, taken in zip(lengths, ours[:, : first - 1], strict=True):
            if not taken.any():
                continue
            a, b = (order.orders[order.lengths.index(length)] for order in (self, other))
            if (equal := a.equal_positions(b)) is None:
                continue
            ends = np.cumsum(taken) // length  # [steps]: positions taken by the end of each
            # Only steps that go on beyond the positions known to be equal are compared.
            for index in np.flatnonzero((taken > 0) & (ends > equal)).tolist():
                positions = np.arange(ends[index] - taken[index] // length, ends[index])
                if not np.array_equal(a.at(positions), b.at(positions)):
                    first = min(first, index + 1)
                    break
        return first if first <= last else None

    def _tokens_by_length(self, last: int) -> dict[int, NDArray[np.int64]]:
        """Return the tokens that each of the first `last` steps takes from each bucket, [steps] by length."""
        return {
            length: np.count_nonzero(self.slots[:last] == bucket, axis=1) * self.slot_tokens
            for bucket, length in enumerate(self.lengths)
        }

    def given(self, steps_done: int) -> NDArray[np.int64]:
        """Return the sequences of each cell in the first `steps_done` steps, [buckets, sources]."""
        taken = zip(self.orders, self.lengths, self.slots_before(steps_done + 1).tolist(), strict=True)
        return np.stack(
            [
                # A bucket without slots may have no knots, which `given` needs.
                order.given(slots * (self.slot_tokens // length)) if slots else np.zeros(len(order.parts), np.int64)
                for order, length, slots in taken
            ]
        )

    def trained(self, steps_done: int) -> tuple[Trained, ...]:
        """Return the part of each cell of the buckets in use that the first `steps_done` steps train on.

        Cells without sequences are left out; the shortest bucket comes first.
        """
        return tuple(
            Trained(source=part.source, length=length, sequences=count, available=part.sequences)
            for length, order, counts in zip(self.lengths, self.orders, self.given(steps_done).tolist(), strict=True)
            for part, count in zip(order.parts, counts, strict=True)
            if part.sequences
        )
