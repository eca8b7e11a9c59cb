"""Sequences in webdataset tar shards, written in order.

A shard holds blocks of sequences, each block three members that any webdataset reader yields as one sample:
`<block>.documents.npy`, uint32 [pieces, 3] = (document's number in its input shard, first pair's offset in the
document, its place in the sequence); `<block>.rows.npy`, uint32 [rows + 1], where each sequence's pieces begin among
them; `<block>.tokens.npy`, [rows, length + 1]. A last member `__index__`, which webdataset skips, lets `SequenceReader`
go straight to a row. Equal input gives equal bytes.
"""

import io
import tarfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ..files import sha256_of, sync
from .document import Split

BLOCK_TOKENS = 1 << 17
"""Tokens in a block: its 3.5 kB of tar and npy headers are then about 1% of a 16-bit block."""

INDEX_MEMBER = "__index__"
INDEX_DTYPE = np.dtype([("rows", "<i8"), ("documents_offset", "<i8"), ("rows_offset", "<i8"), ("tokens_offset", "<i8")])
"""One block: its rows, and the bytes from the shard's start to its arrays' first elements."""

SHARD_DTYPE = np.dtype(
    [
        ("input_shard", "<u4"),
        ("number", "<u4"),
        ("held_out", "?"),
        ("length", "<i8"),
        ("sequences", "<i8"),
        ("size_bytes", "<i8"),
        ("index_offset", "<i8"),
        ("blocks", "<i8"),
        ("sha256", "S64"),
    ]
)
"""One shard in the manifest's table, 113 bytes."""


class ShardName(NamedTuple):
    """What names a shard's file."""

    input_shard: int
    split: Split
    length: int
    number: int

    def path(self) -> str:
        """Return it relative to the prepared directory."""
        return f"shards/{self.input_shard:06d}/{self.split}-L{self.length:07d}-{self.number:06d}.tar"


def shard_name(entry: Any) -> ShardName:
    """Return the name of an element of SHARD_DTYPE."""
    split: Split = "held_out" if entry["held_out"] else "train"
    return ShardName(int(entry["input_shard"]), split, int(entry["length"]), int(entry["number"]))


class BucketWriter:
    """Appends sequences of one length and cuts them into blocks and shards in `folder`.

    `counts` [vocabulary], where given, counts the targets. A context manager: leaving it finishes the last shard;
    leaving it by an exception only closes what is open.
    """

    def __init__(
        self,
        folder: Path,
        name: ShardName,
        dtype: np.dtype,
        shard_tokens: int,
        counts: NDArray[np.int64] | None = None,
    ):
        self._folder = folder
        self._name = name
        self._shard_rows = max(1, shard_tokens // name.length)
        self._block = np.empty((max(1, min(BLOCK_TOKENS, shard_tokens) // name.length), name.length + 1), dtype=dtype)
        self._counts = counts
        self._rows = [0]
        self._pieces: list[tuple[int, int, int]] = []
        self._rows_in_shard = 0
        self._tar: tarfile.TarFile | None = None
        self._index: list[tuple[int, ...]] = []
        self._shards: list[tuple] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            if exc_type is None:
                self._finish_shard()
        finally:
            if self._tar is not None:
                # Buffers may meet the same full disk again; the first error is the one to show.
                with suppress(OSError):
                    self._tar.close()

    def append(self, tokens: NDArray, pieces: list[tuple[int, int, int]]) -> None:
        """Add one sequence: `tokens` [length + 1] of `pieces` (document, first pair's offset in it, place in here)."""
        self._block[len(self._rows) - 1] = tokens
        self._pieces += pieces
        self._rows.append(len(self._pieces))
        self._rows_in_shard += 1
        if self._rows_in_shard == self._shard_rows:
            self._finish_shard()
        elif len(self._rows) > len(self._block):
            self._write_block()

    def shards(self) -> NDArray[np.void]:
        """Return what was written, SHARD_DTYPE [shards]; call it after the context has ended."""
        return np.array(self._shards, dtype=SHARD_DTYPE)

    def _write_block(self) -> None:
        if self._tar is None:
            self._tar = tarfile.open(  # noqa: SIM115  closed by _finish_shard, or on leaving the context
                self._folder / Path(self._name._replace(number=len(self._shards)).path()).name,
                "w",
                format=tarfile.USTAR_FORMAT,
            )
        tokens = self._block[: len(self._rows) - 1]
        if self._counts is not None:
            self._counts += np.bincount(tokens[:, 1:].ravel(), minlength=len(self._counts))
        documents = np.array(self._pieces, dtype="<u4")
        key = f"{len(self._index):06d}"
        offsets = [
            _add(self._tar, f"{key}.{name}.npy", array)
            for name, array in (
                ("documents", documents),
                ("rows", np.array(self._rows, dtype="<u4")),
                ("tokens", tokens),
            )
        ]
        self._index.append((len(tokens), *offsets))
        self._rows, self._pieces = [0], []

    def _finish_shard(self) -> None:
        if len(self._rows) > 1:
            self._write_block()
        if self._tar is None:
            return
        index_offset = _add(self._tar, INDEX_MEMBER, np.array(self._index, dtype=INDEX_DTYPE))
        path = Path(str(self._tar.name))
        self._tar.close()
        self._tar = None
        sync(path)
        sequences = sum(block[0] for block in self._index)
        self._shards.append(
            (
                self._name.input_shard,
                len(self._shards),
                self._name.split == "held_out",
                self._name.length,
                sequences,
                path.stat().st_size,
                index_offset,
                len(self._index),
                sha256_of(path).encode(),
            )
        )
        self._index, self._rows_in_shard = [], 0


def _add(tar: tarfile.TarFile, name: str, array: NDArray) -> int:
    """Add an array as an npy member; return the bytes from the tar's start to its first element."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    # A new TarInfo has time 0, no owner and mode 644: the bytes depend on the array alone.
    member = tarfile.TarInfo(name)
    member.size = buffer.tell()
    buffer.seek(0)
    tar.addfile(member, buffer)
    padded = -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return tar.offset - padded + member.size - array.nbytes
