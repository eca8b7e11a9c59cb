"""Random access to the sequences of a bucket, in the order they were written."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .shards import INDEX_DTYPE, shard_name
from .store import Store, differs

MAX_OPEN_SHARDS = 64
"""Shards a reader keeps mapped; each holds a file descriptor, of which many systems allow a process 1,024."""


class _OpenShard(NamedTuple):
    content: np.memmap
    blocks: NDArray[np.void]
    windows: NDArray
    """Every length + 1 adjacent elements of the shard, as views: one gather copies all sequences wanted."""


class SequenceReader:
    """Reads sequences by their number in the bucket; several threads may read at once.

    `shards` is the bucket's part of the manifest's table, `dtype` that of stored tokens. A shard is mapped into memory
    when first needed, at most MAX_OPEN_SHARDS at a time, the least recently used going first. Raises ValueError, with
    both hashes, when a shard has not the size it should have.
    """

    def __init__(self, store: Store, length: int, shards: NDArray[np.void], dtype: np.dtype):
        self.length = length
        self.first_sequence = np.cumsum([0, *shards["sequences"]], dtype=np.int64)
        self.sequences = int(self.first_sequence[-1])
        self._store = store
        self._shards = shards
        self.dtype = dtype
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, indices: ArrayLike, out: NDArray[np.unsignedinteger] | None = None) -> NDArray[np.unsignedinteger]:
        """Return the tokens of sequences `indices` [n]: [n, length + 1], inputs [:-1] and targets [1:], as stored.

        Stored tokens have 2 bytes (4 with a large vocabulary); whoever needs 8 converts them where memory is fast.
        `out` is filled and returned where given.
        """
        wanted = self._wanted(indices)
        rows = np.empty((len(wanted), self.length + 1), dtype=self.dtype) if out is None else out
        for shard, places, blocks, inside in self._places(wanted):
            starts = shard.blocks["tokens_offset"][blocks] // self.dtype.itemsize + inside * (self.length + 1)
            rows[places] = shard.windows[starts]
        return rows

    def pieces(self, indices: ArrayLike) -> list[NDArray[np.int64]]:
        """Return the origin of each of `indices` [n]: int64 [pieces, 4] = (input shard, record in it, first pair's
        offset in its document, place in the sequence); a sequence of one document has one piece, at place 0."""
        wanted = self._wanted(indices)
        found: list[NDArray[np.int64]] = [np.empty((0, 4), dtype=np.int64)] * len(wanted)
        for shard, places, blocks, inside in self._places(wanted):
            for place, block, row in zip(places.tolist(), shard.blocks[blocks], inside.tolist(), strict=True):
                first, last = np.frombuffer(shard.content, "<u4", 2, int(block["rows_offset"]) + 4 * row).tolist()
                offset = int(block["documents_offset"]) + 12 * first
                stored = np.frombuffer(shard.content, "<u4", 3 * (last - first), offset).reshape(-1, 3)
                number = np.searchsorted(self.first_sequence, wanted[place], side="right") - 1
                origin = np.full((len(stored), 1), self._shards["input_shard"][number], dtype=np.int64)
                found[place] = np.hstack([origin, stored.astype(np.int64)])
        return found

    def document_starts(self, indices: ArrayLike) -> list[tuple[int, ...]]:
        """Return where documents begin in each of `indices` [n], ascending and from 0."""
        return [tuple(pieces[:, 3].tolist()) for pieces in self.pieces(indices)]

    def _wanted(self, indices: ArrayLike) -> NDArray[np.int64]:
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < self.sequences):
            raise IndexError(
                f"sequences [{wanted.min()}, {wanted.max()}] asked of bucket {self.length}, which has {self.sequences}"
            )
        return wanted

    def _places(
        self, wanted: NDArray[np.int64]
    ) -> Iterator[tuple[_OpenShard, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
        """Yield each shard needed with the places in `wanted` that it serves, their blocks and rows in the block."""
        numbers = np.searchsorted(self.first_sequence, wanted, side="right") - 1
        order = np.argsort(numbers, kind="stable")
        if not len(wanted):
            return
        for places in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
            number = int(numbers[places[0]])
            shard = self._opened(number)
            # All blocks of a shard but the last have the same number of rows.
            blocks, inside = np.divmod(wanted[places] - self.first_sequence[number], shard.blocks["rows"][0])
            yield shard, places, blocks, inside

    def _opened(self, number: int) -> _OpenShard:
        with self._lock:
            if number not in self._open:
                if len(self._open) == MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)
                self._open[number] = self._map(self._shards[number])
            self._open.move_to_end(number)
            return self._open[number]

    def _map(self, entry: Any) -> _OpenShard:
        name, sha256 = shard_name(entry).path(), entry["sha256"].decode()
        path = self._store.path(name, sha256)
        if not path.is_file():
            raise ValueError(f"{path} is missing, {entry['size_bytes']} bytes in the manifest")
        content = np.memmap(path, dtype=np.uint8, mode="r")
        if len(content) != entry["size_bytes"]:
            raise ValueError(differs(path, path, sha256))
        index = np.frombuffer(content, INDEX_DTYPE, int(entry["blocks"]), int(entry["index_offset"]))
        tokens = np.frombuffer(content, dtype=self.dtype)
        return _OpenShard(content, index, np.lib.stride_tricks.sliding_window_view(tokens, self.length + 1))
