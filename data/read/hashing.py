"""Hashing of shards beside the training that reads them: each one once in a run's start, by one of its ranks.

All ranks know the order of the whole run, so they share the shards without a message: when the global batch of a step
first reads a shard, the rank whose turn it is by the shard's number hashes it, in a thread and within a bandwidth.
"""

import logging
import queue
import threading
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..format.reader import CHUNK_BYTES, SequenceReader
from .batch_order import BatchOrder, Stretch

log = logging.getLogger(__name__)

LAST_SECONDS = 60
"""Most seconds that the last step waits for shards that are not hashed yet."""


class _StoppedError(Exception):
    """The thread is to end before it has hashed a shard."""


def shards_of_rank(readers: Sequence[SequenceReader], rank: int, num_ranks: int) -> list[NDArray[np.bool_]]:
    """Return, for the shards of each bucket, whether a rank has them to hash, [shards]: every `num_ranks`-th."""
    # [buckets + 1]: the shards of all buckets are numbered through, so that ranks have equally many.
    ends = np.cumsum([0, *(len(reader.first_sequence) - 1 for reader in readers)]).tolist()
    return [np.arange(first, end) % num_ranks == rank for first, end in pairwise(ends)]


class Hashing:
    """Thread that hashes this rank's part of the shards, in the order in which steps first read them.

    `left` says which shards of each bucket are still to be hashed, and is kept up to date. A failure is raised by the
    next `add` or `finish`: DamagedDataError for a shard with another SHA-256, OSError for one that cannot be read.
    """

    def __init__(
        self,
        order: BatchOrder,
        readers: Sequence[SequenceReader],
        left: Sequence[NDArray[np.bool_]],
        bytes_per_s: int,
    ):
        self._order = order
        self._readers = readers
        self._left = left
        self._seconds_a_chunk = CHUNK_BYTES / bytes_per_s
        self._steps: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # None ends the thread
        self._hurry, self._stop = threading.Event(), threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="hashing", daemon=True)
        self._thread.start()

    def add(self, step: int) -> None:
        """Have the shards of `step` hashed."""
        self._raise_failure()
        self._steps.put(step)

    def finish(self) -> None:
        """Hash what is left of the steps added, without a limit of bandwidth, for LAST_SECONDS at most."""
        self._hurry.set()
        self._steps.put(None)
        # None is queued after the steps, so all of them are hashed first.
        self._thread.join(LAST_SECONDS)
        self._raise_failure()
        if self._thread.is_alive():
            log.warning("not all shards could be hashed by the last step; `longring inspect` verifies them all")

    def close(self) -> None:
        """End the thread."""
        self._stop.set()  # before _hurry, which wakes _wait to look at it
        self._hurry.set()
        self._steps.put(None)
        self._thread.join()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            while (step := self._steps.get()) is not None and not self._stop.is_set():
                for stretch in self._order.batch(step):
                    self._hash(step, stretch)
        except _StoppedError:
            pass
        except Exception as error:
            self._failure = error

    def _hash(self, step: int, stretch: Stretch) -> None:
        """Hash the shards of a stretch of `step` that are left."""
        left, reader = self._left[stretch.bucket], self._readers[stretch.bucket]
        if not left.any():
            return
        # [shards], ascending. `left` has none of another rank.
        read = np.unique(reader.shards_of(self._order.sequences(stretch)))
        for shard in read[left[read]].tolist():
            where = f", and step {step} reads it, so checkpoints from step {step} on may have trained on it"
            reader.verify(shard, where, self._wait)
            left[shard] = False

    def _wait(self, seconds: float) -> None:
        """Wait, after a chunk that took `seconds`, for the rest of its time. Raises _StoppedError to end the thread."""
        self._hurry.wait(max(0.0, self._seconds_a_chunk - seconds))
        if self._stop.is_set():
            raise _StoppedError
