"""The train split of prepared data, read in a BatchOrder ahead of the model. Its state is the step."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from ..config import CurriculumConfig, LoaderConfig
from ..format.manifest import Manifest
from ..format.reader import SequenceReader
from .batch_order import BatchOrder, Share, bucket_orders, bucket_tokens
from .curriculum import step_buckets
from .knots import Knots


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one rank reads for one forward and backward."""

    step: int
    """Counted from 1."""
    micro_step: int
    """Counted from 0 within the step."""
    length: int
    """Tokens of each sequence."""

    rows: NDArray[np.unsignedinteger]
    """[sequences, length + 1], in the dtype they are stored in: inputs are [:, :-1], targets [:, 1:]."""

    document_starts: tuple[tuple[int, ...], ...] | None
    """Where documents begin in each row, ascending and from 0; None where neither attention nor positions tell
    documents apart."""

    trained: NDArray[np.bool_] | None = None
    """[sequences, length], which targets the loss counts; None for all."""


def training_order(
    manifest: Manifest,
    curriculum: CurriculumConfig,
    loader: LoaderConfig,
    *,
    steps: int,
    global_batch_tokens: int,
    seed: int,
) -> BatchOrder:
    """Return the order of a run of `steps`: a function of these arguments and of nothing else."""
    orders = bucket_orders(manifest.buckets("train"), curriculum.weights, loader.window_tokens, seed)
    chosen = step_buckets(bucket_tokens(manifest.lengths, orders), steps, curriculum, seed)
    return BatchOrder(manifest.lengths, orders, chosen, global_batch_tokens)


class Loader:
    """Reads one rank's rows.

    `share_of` says for each length which part of a micro-batch the rank takes. With `pin_memory` rows lie in
    page-locked memory, from which a copy to the GPU needs not be waited for.
    """

    def __init__(
        self,
        manifest: Manifest,
        order: BatchOrder,
        config: LoaderConfig,
        share_of: Callable[[int], Share],
        *,
        pin_memory: bool = False,
        knots: Knots | None = None,
    ):
        self.order = order
        self._needs_starts = manifest.needs_starts
        self._knots = knots
        self._config = config
        self._share_of = share_of
        self._pin_memory = pin_memory
        self._readers = [manifest.reader(bucket) for bucket in manifest.buckets("train")]

    def batches(self, after: int, last: int) -> Generator[MicroBatch, None, None]:
        """Yield the micro-batches of steps after + 1, ..., last, in order; what reading raises is raised here."""
        work = self._work(after, last)
        if not self._config.workers:
            for read in work:
                yield read()
            return
        pool = ThreadPoolExecutor(self._config.workers, "loader")
        try:
            # Submitted here, as what is to be read costs some 0.1 ms a step to work out: each batch taken starts the
            # reading of one that many later.
            ahead = deque(map(pool.submit, islice(work, self._config.prefetch_batches)))
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(map(pool.submit, islice(work, 1)))
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)

    def _work(self, after: int, last: int) -> Iterator[Callable[[], MicroBatch]]:
        for step in range(after + 1, last + 1):
            bucket = self.order.bucket(step)
            indices = self.order.sequences(step, self._share_of(self.order.lengths[bucket]))
            for micro_step, rows in enumerate(indices):
                yield partial(self._read, step, micro_step, bucket, rows)

    def _read(self, step: int, micro_step: int, bucket: int, indices: NDArray[np.int64]) -> MicroBatch:
        reader = self._readers[bucket]
        rows = None
        if self._pin_memory:
            dtype = torch.from_numpy(np.empty(0, dtype=reader.dtype)).dtype
            rows = torch.empty(len(indices), reader.length + 1, dtype=dtype, pin_memory=True).numpy()
        rows, starts, trained = read_rows(reader, indices, self._needs_starts, self._knots, out=rows)
        return MicroBatch(
            step=step,
            micro_step=micro_step,
            length=reader.length,
            rows=rows,
            document_starts=starts,
            trained=trained,
        )


def read_rows(
    reader: SequenceReader,
    indices: NDArray[np.int64],
    needs_starts: bool,
    knots: Knots | None,
    out: NDArray[np.unsignedinteger] | None = None,
) -> tuple[NDArray[np.unsignedinteger], tuple[tuple[int, ...], ...] | None, NDArray[np.bool_] | None]:
    """Return sequences `indices` [n], tied where `knots` says so: rows, document starts and trained targets.

    As MicroBatch has them. Attention sees all of a tied sequence, whose chunks belong to each other.
    """
    rows = reader.read(indices, out=out)
    starts = reader.document_starts(indices) if needs_starts else None
    trained = None
    if knots is not None:
        trained = np.ones((len(rows), reader.length), dtype=np.bool_)
        for place, number in enumerate(indices.tolist()):
            tied = knots.tie(rows[place], number)
            if tied is not None:
                rows[place], trained[place] = tied
                if starts is not None:
                    starts[place] = (0,)
    return rows, None if starts is None else tuple(starts), trained
