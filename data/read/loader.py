"""The loader, which reads the train split in the order of a run, ahead of the model; its only state is the step."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..config import LoaderConfig
from ..format.manifest import Manifest
from ..format.reader import SequenceReader
from ..format.store import LocalStore
from .batch_order import BatchOrder, ReplicaShare
from .hashing import Hashing, shards_of_rank
from .knots import Knots


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The rows that one rank reads for one forward and backward."""

    step: int
    """Step, counted from 1."""
    micro_step: int
    """Index of the micro-batch within the step, from 0."""
    length: int
    """Tokens of each sequence."""

    rows: NDArray[np.unsignedinteger]
    """Tokens [sequences, length + 1] in their stored dtype; inputs are [:, :-1], targets are [:, 1:]."""

    document_starts: tuple[tuple[int, ...], ...] | None
    """Positions at which documents begin in each row, ascending, the first one 0; None where neither attention nor
    positions distinguish documents."""

    trained: NDArray[np.bool_] | None = None
    """Mask [sequences, length] of the targets that the loss counts; None counts all."""

    prepared: Any = None
    """Result of the loader's `prepare`, if it has one."""


class Loader:
    """Reader of the rows of one rank, in the order of the run.

    `share_of(length)` returns the part of a micro-batch that the rank takes. With `pin_memory` rows lie in page-locked
    memory, from which a copy to the GPU is asynchronous. `knots` ties some sequences as they are read. The threads call
    `prepare(length, number of rows, document_starts)` for each micro-batch; it does there what training would otherwise
    wait for. The rank is one of `hashed_by` = (rank, number of ranks), which share the hashing of a local directory's
    shards; those of a remote one have been hashed where they are cached.
    """

    def __init__(
        self,
        manifest: Manifest,
        order: BatchOrder,
        config: LoaderConfig,
        share_of: Callable[[int], ReplicaShare],
        *,
        pin_memory: bool = False,
        knots: Knots | None = None,
        prepare: Callable[[int, int, tuple[tuple[int, ...], ...] | None], Any] | None = None,
        hashed_by: tuple[int, int] = (0, 1),
    ):
        self.order = order
        self._needs_starts = manifest.needs_starts
        self._knots = knots
        self._prepare = prepare
        self._config = config
        self._share_of = share_of
        self._pin_memory = pin_memory
        buckets = {bucket.length: bucket for bucket in manifest.buckets("train")}
        self._readers = [manifest.reader(buckets[length]) for length in order.lengths]
        self._hashes = isinstance(manifest.store, LocalStore) and config.hash_bytes_per_s > 0
        self._to_hash = shards_of_rank(self._readers, *hashed_by)

    def batches(self, after: int, last: int) -> Generator[MicroBatch, None, None]:
        """Yield the micro-batches of steps after + 1, ..., last, in order.

        Errors of the threads are raised here. Closing the generator ends its threads.
        """
        hashing = None
        if self._hashes:
            hashing = Hashing(self.order, self._readers, self._to_hash, self._config.hash_bytes_per_s)
        try:
            yield from self._ahead(self._reads(after, last, hashing))
        finally:
            if hashing is not None:
                hashing.close()

    def _ahead(self, reads: Iterator[Callable[[], MicroBatch]]) -> Generator[MicroBatch, None, None]:
        """Yield the results of `reads`, which threads call ahead of the consumer."""
        if not self._config.workers:
            for read in reads:
                yield read()
            return
        pool = ThreadPoolExecutor(self._config.workers, "loader")
        try:
            # `prefetch_batches` reads are always in flight: each batch that is taken submits one more. The order itself
            # is computed in this thread, which costs some 0.1 ms a step.
            ahead = deque(map(pool.submit, islice(reads, self._config.prefetch_batches)))
            while ahead:
                batch = ahead.popleft().result()
                # Before the yield, so that threads read while this batch is trained on.
                ahead.extend(map(pool.submit, islice(reads, 1)))
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)

    def _reads(self, after: int, last: int, hashing: Hashing | None) -> Iterator[Callable[[], MicroBatch]]:
        """Yield, for each micro-batch in order, the function that reads it."""
        for step in range(after + 1, last + 1):
            if hashing is not None:
                hashing.add(step)
                if step == last:
                    hashing.finish()  # before the last batches are yielded
            micro_steps = count()  # goes on through the stretches of a step
            # The longest bucket first, on all ranks: they are always in the same bucket.
            for stretch in self.order.batch(step):
                share = self._share_of(self.order.lengths[stretch.bucket])
                for indices in self.order.micro_batches(stretch, share):  # [sequences]
                    yield partial(self._read, step, next(micro_steps), stretch.bucket, indices)

    def _read(self, step: int, micro_step: int, bucket: int, indices: NDArray[np.int64]) -> MicroBatch:
        reader = self._readers[bucket]
        rows = None
        if self._pin_memory:
            dtype = torch.from_numpy(np.empty(0, dtype=reader.dtype)).dtype
            # numpy sees the page-locked memory of the tensor, into which the reader gathers the rows.
            rows = torch.empty(len(indices), reader.length + 1, dtype=dtype, pin_memory=True).numpy()
        rows, starts, trained = read_rows(reader, indices, self._needs_starts, self._knots, out=rows)
        if self._pin_memory and trained is not None:
            trained = torch.from_numpy(trained).pin_memory().numpy()
        return MicroBatch(
            step=step,
            micro_step=micro_step,
            length=reader.length,
            rows=rows,
            document_starts=starts,
            trained=trained,
            prepared=None if self._prepare is None else self._prepare(reader.length, len(rows), starts),
        )


def read_rows(
    reader: SequenceReader,
    indices: NDArray[np.int64],
    needs_starts: bool,
    knots: Knots | None,
    out: NDArray[np.unsignedinteger] | None = None,
) -> tuple[NDArray[np.unsignedinteger], tuple[tuple[int, ...], ...] | None, NDArray[np.bool_] | None]:
    """Return the rows, document starts and trained targets of sequences `indices` [n], as in MicroBatch.

    `knots` ties a part of the sequences; None ties none. A tied sequence has one document start: its chunks belong to
    each other, so attention sees all of them. `out` [n, length + 1] is the array to read into.
    """
    rows = reader.read(indices, out=out)
    starts = reader.document_starts(indices) if needs_starts else None
    trained = None
    if knots is not None:
        trained = np.ones((len(rows), reader.length), dtype=np.bool_)
        # A tied row depends on the number of its sequence alone, so the batch it is in does not matter.
        for row, sequence in enumerate(indices.tolist()):
            tied = knots.tie(rows[row], sequence)
            if tied is not None:
                rows[row], trained[row] = tied
                if starts is not None:
                    starts[row] = (0,)
    return rows, None if starts is None else tuple(starts), trained
