"""Random access to the sequences of a bucket, numbered in the order in which they were written."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .shards import INDEX_DTYPE, shard_name
from .store import Store, damaged_shard

MAX_OPEN_SHARDS = 64
"""Number of shards that a reader keeps mapped; each holds a file descriptor, of which many systems allow 1,024."""


class _OpenShard(NamedTuple):
    content: np.memmap
    """Bytes of the shard, [size]."""

    samples: NDArray[np.void]
    """Index of the shard, INDEX_DTYPE [samples]."""

    rows: NDArray
    """View [elements - length, length + 1] of the shard as tokens: entry i is the length + 1 tokens from element i on.
    One index with the first elements of the wanted sequences copies all of these sequences."""


class SequenceReader:
    """Reader of sequences by their number in the bucket; several threads may read at once.

    `shards` is the bucket's part of the manifest's table, SHARD_DTYPE [shards], and `dtype` the type of stored tokens.
    A shard is mapped into memory when first needed; at most MAX_OPEN_SHARDS are, and the least recently used is
    unmapped first. Raises ValueError if a shard is missing or has another size; the message advises to run `command`,
    which made the data.
    """

    def __init__(
        self,
        store: Store,
        length: int,
        shards: NDArray[np.void],
        dtype: np.dtype,
        command: str = "longring prepare",
    ):
        self.length = length
        self.first_sequence = np.cumsum([0, *shards["sequences"]], dtype=np.int64)
        """First sequence of each shard, and the number of sequences at the end: int64 [shards + 1]."""
        self.sequences = int(self.first_sequence[-1])
        self._store = store
        self._shards = shards
        self.dtype = dtype
        self._command = command
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, indices: ArrayLike, out: NDArray[np.unsignedinteger] | None = None) -> NDArray[np.unsignedinteger]:
        """Return the tokens of sequences `indices` [n], as stored: [n, length + 1], inputs [:-1] and targets [1:].

        Stored tokens have 2 bytes, or 4 with a large vocabulary; a caller that needs 8 converts them where memory is
        fast. `out` is filled and returned if given. Raises IndexError if an index is outside the bucket.
        """
        wanted = self._checked(indices)
        rows = np.empty((len(wanted), self.length + 1), dtype=self.dtype) if out is None else out
        for shard, positions, samples, inside in self._by_shard(wanted):
            # First element of each sequence, counted in tokens from the start of the shard: [positions].
            starts = shard.samples["tokens_offset"][samples] // self.dtype.itemsize + inside * (self.length + 1)
            rows[positions] = shard.rows[starts]
        return rows

    def pieces(self, indices: ArrayLike) -> list[NDArray[np.int64]]:
        """Return the pieces of each of the sequences `indices` [n].

        Pieces are int64 [pieces, 4] = (input shard, record in it, offset of the first pair in its document, position in
        the sequence). A sequence of one document has one piece, at position 0. Raises IndexError as `read` does.
        """
        wanted = self._checked(indices)
        found: list[NDArray[np.int64]] = [np.empty((0, 4), dtype=np.int64)] * len(wanted)
        for shard, positions, samples, inside in self._by_shard(wanted):
            for position, sample, row in zip(positions.tolist(), shard.samples[samples], inside.tolist(), strict=True):
                # rows[row] and rows[row + 1] delimit the entries of the sequence in `documents`, 3 x 4 bytes each.
                first, last = np.frombuffer(shard.content, "<u4", 2, int(sample["rows_offset"]) + 4 * row).tolist()
                offset = int(sample["documents_offset"]) + 12 * first
                stored = np.frombuffer(shard.content, "<u4", 3 * (last - first), offset).reshape(-1, 3)  # [pieces, 3]
                number = np.searchsorted(self.first_sequence, wanted[position], side="right") - 1
                input_shard = np.full((len(stored), 1), self._shards["input_shard"][number], dtype=np.int64)
                found[position] = np.hstack([input_shard, stored.astype(np.int64)])  # [pieces, 4]
        return found

    def document_starts(self, indices: ArrayLike) -> list[tuple[int, ...]]:
        """Return the positions at which documents begin in each of the sequences `indices` [n], ascending from 0."""
        return [tuple(pieces[:, 3].tolist()) for pieces in self.pieces(indices)]

    def _checked(self, indices: ArrayLike) -> NDArray[np.int64]:
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < self.sequences):
            raise IndexError(
                f"sequences span [{wanted.min()}, {wanted.max()}], outside bucket {self.length}, "
                f"which has {self.sequences}"
            )
        return wanted

    def _by_shard(
        self, wanted: NDArray[np.int64]
    ) -> Iterator[tuple[_OpenShard, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
        """Yield (shard, positions, samples, rows) for each shard that holds sequences of `wanted` [n].

        The arrays are int64 [sequences of the shard]: positions in `wanted`, and sample and row within the shard.
        """
        if not len(wanted):
            return
        numbers = np.searchsorted(self.first_sequence, wanted, side="right") - 1  # [n], shard of each sequence
        # The stable sort puts the sequences of a shard side by side; each run of equal numbers is one shard.
        order = np.argsort(numbers, kind="stable")
        for positions in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
            number = int(numbers[positions[0]])
            shard = self._opened(number)
            # All samples of a shard but the last have the same number of rows.
            samples, inside = np.divmod(wanted[positions] - self.first_sequence[number], shard.samples["rows"][0])
            yield shard, positions, samples, inside

    def _opened(self, number: int) -> _OpenShard:
        with self._lock:
            if number not in self._open:
                if len(self._open) == MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)
                self._open[number] = self._map(self._shards[number])
            self._open.move_to_end(number)
            return self._open[number]

    def _map(self, entry: Any) -> _OpenShard:
        name, size_bytes, sha256 = shard_name(entry).path(), int(entry["size_bytes"]), entry["sha256"].decode()
        path = self._store.path(name, sha256)
        if path.is_file() and path.stat().st_size != size_bytes:
            # A cached copy that is incomplete is downloaded again; a local file stays as it is.
            path = self._store.path(name, sha256, anew=True)
        if (error := damaged_shard(path, size_bytes, sha256, self._command)) is not None:
            raise error
        content = np.memmap(path, dtype=np.uint8, mode="r")
        index = np.frombuffer(content, INDEX_DTYPE, int(entry["samples"]), int(entry["index_offset"]))
        # Arrays begin at multiples of 64 bytes in a tar, so the whole shard can be viewed as tokens.
        tokens = np.frombuffer(content, dtype=self.dtype)
        return _OpenShard(content, index, np.lib.stride_tricks.sliding_window_view(tokens, self.length + 1))
