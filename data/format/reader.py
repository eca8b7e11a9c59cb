"""Random access to the sequences of a bucket, numbered in the order in which they were written."""

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..files import read_patiently
from .damage import DamagedDataError, wrong_content, wrong_hash
from .shard_file import ShardFile
from .shards import shard_name
from .store import Store

MAX_OPEN_SHARDS = 64
"""Number of shards that a reader keeps open; each holds a file descriptor, of which many systems allow 1,024."""

CHUNK_BYTES = 1 << 20
"""Number of bytes that are hashed at once."""


class SequenceReader:
    """Reader of sequences by their number in the bucket; several threads may read at once.

    `shards` is the bucket's part of the manifest's table, SHARD_DTYPE [shards], `dtype` the type of stored tokens, and
    `vocab_size` one past the largest of them. A shard is opened when first needed; at most MAX_OPEN_SHARDS are open,
    and the least recently used is closed first. `command` made the data, and errors advise to run it.

    Methods raise DamagedDataError if a shard is not what the manifest says, FileNotFoundError if one is missing, and
    OSError if one still cannot be read after a few attempts.
    """

    def __init__(
        self,
        store: Store,
        length: int,
        shards: NDArray[np.void],
        dtype: np.dtype,
        vocab_size: int,
        command: str = "longring prepare",
    ):
        self.length = length
        self.first_sequence = np.cumsum([0, *shards["sequences"]], dtype=np.int64)
        """First sequence of each shard, and the number of sequences at the end: int64 [shards + 1]."""
        self.sequences = int(self.first_sequence[-1])
        self._store = store
        self._shards = shards
        self.dtype = dtype
        self._vocab_size = vocab_size
        self._command = command
        self._open: OrderedDict[int, ShardFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, indices: ArrayLike, out: NDArray[np.unsignedinteger] | None = None) -> NDArray[np.unsignedinteger]:
        """Return the tokens of sequences `indices` [n], as stored: [n, length + 1], inputs [:-1] and targets [1:].

        Stored tokens have 2 bytes, or 4 with a large vocabulary; a caller that needs 8 converts them where memory is
        fast. `out` is filled and returned if given. Raises IndexError if an index is outside the bucket.
        """
        wanted = self._checked(indices)
        rows = np.empty((len(wanted), self.length + 1), dtype=self.dtype)
        if out is not None and out.dtype == self.dtype:
            rows = out
        for shard, positions, samples, inside in self._by_shard(wanted):
            # Byte offset of each sequence: [positions].
            offsets = shard.samples["tokens_offset"][samples] + inside * rows[:1].nbytes
            shard.read(zip((rows[position] for position in positions), offsets.tolist(), strict=True))
        if rows.size and rows.max() >= self._vocab_size:  # the embedding has no row for it
            raise self._bad_token(wanted, rows)
        if out is None or rows is out:
            return rows
        out[:] = rows
        return out

    def pieces(self, indices: ArrayLike) -> list[NDArray[np.int64]]:
        """Return the pieces of each of the sequences `indices` [n].

        Pieces are int64 [pieces, 4] = (input shard, record in it, offset of the first pair in its document, position in
        the sequence). A sequence of one document has one piece, at position 0. Raises IndexError as `read` does.
        """
        wanted = self._checked(indices)
        found: list[NDArray[np.int64]] = [np.empty((0, 4), dtype=np.int64)] * len(wanted)
        for shard, positions, samples, inside in self._by_shard(wanted):
            # rows[row] and rows[row + 1] delimit the entries of a sequence in `documents`, 3 x 4 bytes each.
            ends = np.empty((len(positions), 2), dtype="<u4")  # [positions, (first piece, one past the last)]
            shard.read(zip(ends, (shard.samples["rows_offset"][samples] + 4 * inside).tolist(), strict=True))
            counts = ends[:, 1].astype(np.int64) - ends[:, 0]
            if not ((counts > 0) & (counts <= self.length)).all():
                raise self._wrong(shard.path, int(wanted[positions[0]]), "its table of pieces does not fit it")
            firsts = np.cumsum(counts) - counts  # [positions], the first of the pieces of each sequence
            stored = np.empty((int(counts.sum()), 3), dtype="<u4")  # [pieces, 3], of all sequences
            offsets = shard.samples["documents_offset"][samples] + 12 * ends[:, 0].astype(np.int64)
            shard.read(zip(np.split(stored, firsts[1:]), offsets.tolist(), strict=True))
            starts = stored[:, 2].astype(np.int64)
            rises = np.diff(starts, prepend=0) > 0  # [pieces]: positions ascend within a sequence
            rises[firsts] = starts[firsts] == 0
            if not rises.all() or starts.max() >= self.length:
                raise self._wrong(shard.path, int(wanted[positions[0]]), "its table of pieces does not fit it")
            input_shard = np.full(len(stored), shard.input_shard)
            table = np.column_stack([input_shard, stored]).astype(np.int64)  # [pieces, 4]
            for position, pieces in zip(positions.tolist(), np.split(table, firsts[1:]), strict=True):
                found[position] = pieces
        return found

    def document_starts(self, indices: ArrayLike) -> list[tuple[int, ...]]:
        """Return the positions at which documents begin in each of the sequences `indices` [n], ascending from 0."""
        return [tuple(pieces[:, 3].tolist()) for pieces in self.pieces(indices)]

    def _checked(self, indices: ArrayLike) -> NDArray[np.int64]:
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < self.sequences):
            raise IndexError(
                f"indices: span [{wanted.min()}, {wanted.max()}], outside of bucket {self.length}, which has "
                f"{self.sequences} sequences; leave out those outside"
            )
        return wanted

    def shards_of(self, wanted: ArrayLike) -> NDArray[np.int64]:
        """Return the index of the shard of each of the sequences `wanted`, in the same shape."""
        return np.searchsorted(self.first_sequence, wanted, side="right") - 1

    def _by_shard(
        self, wanted: NDArray[np.int64]
    ) -> Iterator[tuple[ShardFile, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
        """Yield (shard, positions, samples, rows) for each shard that holds sequences of `wanted` [n].

        The arrays are int64 [sequences of the shard]: positions in `wanted`, and sample and row within the shard.
        """
        if not len(wanted):
            return
        numbers = self.shards_of(wanted)  # [n]
        # The stable sort puts the sequences of a shard side by side; each run of equal numbers is one shard.
        order = np.argsort(numbers, kind="stable")
        for positions in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
            number = int(numbers[positions[0]])
            shard = self._opened(number)
            # All samples of a shard but the last have the same number of rows.
            samples, inside = np.divmod(wanted[positions] - self.first_sequence[number], shard.samples["rows"][0])
            yield shard, positions, samples, inside

    def _opened(self, number: int) -> ShardFile:
        with self._lock:
            if number not in self._open:
                if len(self._open) == MAX_OPEN_SHARDS:
                    # Another thread may still read from it: its descriptor closes after that.
                    self._open.popitem(last=False)
                entry, row_bytes = self._shards[number], (self.length + 1) * self.dtype.itemsize
                self._open[number] = ShardFile(self.path(number), entry, row_bytes, self._command)
            self._open.move_to_end(number)
            return self._open[number]

    def verify(self, number: int, where: str, after_chunk: Callable[[float], object]) -> None:
        """Hash a shard of the bucket; `after_chunk` gets the seconds that each chunk of CHUNK_BYTES took.

        Raises DamagedDataError, with `where` in its message, if the SHA-256 is not the manifest's, and OSError if the
        shard cannot be read.
        """
        path, expected = self.path(number), self._shards["sha256"][number].decode()

        def hash_file() -> str:
            digest = hashlib.sha256()
            with path.open("rb", buffering=0) as file:
                began = time.monotonic()
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
                    after_chunk(time.monotonic() - began)
                    began = time.monotonic()
            return digest.hexdigest()

        if (error := wrong_hash(path, read_patiently(path, hash_file), expected, self._command, where)) is not None:
            raise error

    def path(self, number: int) -> Path:
        """Return the local path of a shard of the bucket, which a remote store has downloaded."""
        entry = self._shards[number]
        name, sha256, size_bytes = shard_name(entry).path(), entry["sha256"].decode(), int(entry["size_bytes"])
        path = self._store.path(name, sha256, size_bytes)
        if path.is_file() and path.stat().st_size != size_bytes:
            # A cached copy that is incomplete is downloaded again; a local file stays as it is.
            path = self._store.path(name, sha256, size_bytes, anew=True)
        return path

    def _bad_token(self, wanted: NDArray[np.int64], rows: NDArray[np.unsignedinteger]) -> DamagedDataError:
        """Return the error of the first token outside the vocabulary in `rows` [n, length + 1] of `wanted` [n]."""
        row, position = np.argwhere(rows >= self._vocab_size)[0].tolist()
        what = f"token {position} is {rows[row, position]}, outside the vocabulary of {self._vocab_size}"
        return self._wrong(self.path(int(self.shards_of(wanted[row]))), int(wanted[row]), what)

    def _wrong(self, path: Path, sequence: int, what: str) -> DamagedDataError:
        sha256 = self._shards["sha256"][int(self.shards_of(sequence))].decode()
        return wrong_content(path, f"sequence {sequence} of bucket {self.length}: {what}", sha256, self._command)
