"""Sequences in webdataset tar shards: written in order, read at random.

`<split>/L<length>/<shard>.tar` holds members `<block>.documents.npy`, int64 [rows, 2] = (document number, first pair's
offset in that document), and `<block>.tokens.npy`, [rows, length + 1]. Any webdataset reader can stream them; the
index of blocks kept in the manifest lets `SequenceReader` go straight to a row. Equal input gives equal bytes.
"""

import hashlib
import io
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from webdataset.writer import TarWriter

BLOCK_TOKENS = 1 << 17
"""Tokens in a block: its 2.3 kB of tar and npy headers are then under 1% of a 16-bit block."""

MAX_OPEN_SHARDS = 64
"""Shards a reader keeps mapped; each holds a file descriptor, of which many systems allow a process 1,024."""

TAR_BLOCK_BYTES = 512


class Block(NamedTuple):
    """A run of sequences in a shard. Offsets are bytes from the shard's start to the arrays' first elements."""

    rows: int
    tokens_offset: int
    documents_offset: int


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file; `file` is relative to the prepared directory."""

    file: str
    size_bytes: int
    sha256: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """All sequences of one length in one split."""

    length: int
    sequences: int
    shards: tuple[Shard, ...]

    @property
    def tokens(self) -> int:
        """Trained tokens in the bucket: `length` for each sequence, though length + 1 are stored."""
        return self.length * self.sequences


class BucketWriter:
    """Appends sequences of one length and cuts them into blocks and shards.

    A context manager: leaving it finishes the last shard; leaving it by an exception only closes what is open.
    """

    def __init__(self, root: Path, split: str, length: int, dtype: np.dtype, shard_tokens: int):
        self._root = root
        self._folder = Path(split, f"L{length:07d}")
        self._length = length
        self._dtype = dtype
        self._shard_rows = max(1, shard_tokens // length)
        self._block_rows = max(1, BLOCK_TOKENS // length)
        self._tokens: list[NDArray] = []
        self._origins: list[tuple[int, int]] = []
        self._rows_in_shard = 0
        self._file: BinaryIO | None = None
        self._blocks: list[Block] = []
        self._shards: list[Shard] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            if exc_type is None:
                self._finish_shard()
        finally:
            if self._file is not None:
                # Buffers may meet the same full disk again; the first error is the one to show.
                with suppress(OSError):
                    self._tar.close()
                with suppress(OSError):
                    self._file.close()

    def append(self, tokens: NDArray, document: int, offset: int) -> None:
        """Add one sequence: `tokens` [length + 1], starting at pair `offset` of document number `document`."""
        # A view would keep its whole document in memory until the block is full.
        self._tokens.append(tokens.copy())
        self._origins.append((document, offset))
        self._rows_in_shard += 1
        if self._rows_in_shard == self._shard_rows:
            self._finish_shard()
        elif len(self._tokens) == self._block_rows:
            self._write_block()

    def bucket(self) -> Bucket:
        """Return what was written; call it after the context has ended."""
        sequences = sum(block.rows for shard in self._shards for block in shard.blocks)
        return Bucket(length=self._length, sequences=sequences, shards=tuple(self._shards))

    def _write_block(self) -> None:
        if self._file is None:
            path = self._root / self._folder / f"{len(self._shards):06d}.tar"
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("wb")
            # A fixed time, owner and mode: the bytes depend on the sequences alone.
            self._tar = TarWriter(file, user="longring", group="longring", mode=0o644, mtime=0, encoder=False)
            self._file = file
        tokens = np.stack(self._tokens).astype(self._dtype, copy=False)
        origins = np.array(self._origins, dtype="<i8")
        tokens_npy, origins_npy = _npy(tokens), _npy(origins)
        # The writer sorts members by name, so the documents come first; each has one header block, as a whole-numbered
        # time and less than 8 GiB need no pax header.
        documents_end = self._tar.tarstream.offset + TAR_BLOCK_BYTES + len(origins_npy)
        tokens_start = -(-documents_end // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES + TAR_BLOCK_BYTES
        self._blocks.append(
            Block(
                rows=len(tokens),
                tokens_offset=tokens_start + len(tokens_npy) - tokens.nbytes,
                documents_offset=documents_end - origins.nbytes,
            )
        )
        key = f"{len(self._blocks) - 1:06d}"
        self._tar.write({"__key__": key, "documents.npy": origins_npy, "tokens.npy": tokens_npy})
        self._tokens, self._origins = [], []

    def _finish_shard(self) -> None:
        if self._tokens:
            self._write_block()
        if self._file is None:
            return
        self._tar.close()
        self._file.close()
        self._file = None
        file = self._folder / f"{len(self._shards):06d}.tar"
        path = self._root / file
        self._shards.append(
            Shard(
                file=file.as_posix(), size_bytes=path.stat().st_size, sha256=sha256_of(path), blocks=tuple(self._blocks)
            )
        )
        self._blocks, self._rows_in_shard = [], 0


class SequenceReader:
    """Random access to the sequences of one bucket, in the order they were written.

    Shards are mapped into memory when first needed, at most MAX_OPEN_SHARDS at a time, the least recently used going
    first. `dtype` is the manifest's.
    """

    def __init__(self, root: Path, bucket: Bucket, dtype: np.dtype):
        self.length = bucket.length
        self.sequences = bucket.sequences
        self._dtype = dtype
        self._files = [root / shard.file for shard in bucket.shards]
        self._maps: OrderedDict[int, np.memmap] = OrderedDict()
        blocks = [(shard, block) for shard, entry in enumerate(bucket.shards) for block in entry.blocks]
        self._shard_of = np.array([shard for shard, _ in blocks], dtype=np.int64)
        self._tokens_offset = np.array([block.tokens_offset for _, block in blocks], dtype=np.int64)
        self._documents_offset = np.array([block.documents_offset for _, block in blocks], dtype=np.int64)
        self._first_row = np.cumsum([0, *(block.rows for _, block in blocks)])

    def read(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Return the tokens of sequences `indices` [n]: int64 [n, length + 1], inputs [:-1] and targets [1:]."""
        return self._rows(indices, self._tokens_offset, self._dtype, self.length + 1)

    def documents(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Return the origin of sequences `indices` [n]: int64 [n, 2] = (document number, first pair's offset)."""
        return self._rows(indices, self._documents_offset, np.dtype("<i8"), 2)

    def _rows(self, indices: ArrayLike, offsets: NDArray, dtype: np.dtype, width: int) -> NDArray[np.int64]:
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < self.sequences):
            raise IndexError(
                f"sequences [{wanted.min()}, {wanted.max()}] asked of bucket {self.length}, which has {self.sequences}"
            )
        blocks = np.searchsorted(self._first_row, wanted, side="right") - 1
        starts = offsets[blocks] + (wanted - self._first_row[blocks]) * width * dtype.itemsize
        rows = np.empty((len(wanted), width), dtype=np.int64)
        for row, (shard, start) in enumerate(zip(self._shard_of[blocks].tolist(), starts.tolist(), strict=True)):
            rows[row] = np.frombuffer(self._mapped(shard), dtype=dtype, count=width, offset=start)
        return rows

    def _mapped(self, shard: int) -> np.memmap:
        if shard not in self._maps:
            if len(self._maps) == MAX_OPEN_SHARDS:
                self._maps.popitem(last=False)
            self._maps[shard] = np.memmap(self._files[shard], dtype=np.uint8, mode="r")
        self._maps.move_to_end(shard)
        return self._maps[shard]


def sha256_of(path: Path) -> str:
    """Return the file's SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _npy(array: NDArray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()
