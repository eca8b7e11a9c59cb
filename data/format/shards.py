"""Webdataset tar shards of sequences, written in order.

A shard holds samples. A sample holds adjacent sequences in three members, which any webdataset reader yields together:
`<sample>.documents.npy`, uint32 [pieces, 3] = (document's number in its input shard, offset of the first pair in the
document, position in the sequence); `<sample>.rows.npy`, uint32 [rows + 1], the first piece of each sequence;
`<sample>.tokens.npy`, [rows, length + 1]. The last member, `__index__`, which webdataset skips, gives
`SequenceReader` the byte offset of each array. Equal input gives equal bytes.
"""

import io
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.lib import recfunctions
from numpy.typing import NDArray

from ..files import sha256_of, sync
from .arrays import read_array
from .document import Split
from .names import is_sha256

SAMPLE_TOKENS = 1 << 17
"""Number of tokens in a sample: its 3.5 kB of tar and npy headers are then about 1% of a sample of 16-bit tokens."""

MAX_SHARD_BYTES = 1 << 50

INDEX_MEMBER = "__index__"
INDEX_DTYPE = np.dtype([("rows", "<i8"), ("documents_offset", "<i8"), ("rows_offset", "<i8"), ("tokens_offset", "<i8")])
"""Index entry of a sample: its number of rows, and the byte offset in the shard of the first element of each array."""

SHARD_DTYPE = np.dtype(
    [
        ("input_shard", "<u4"),
        ("number", "<u4"),
        ("held_out", "?"),
        ("length", "<i8"),
        ("sequences", "<i8"),
        ("size_bytes", "<i8"),
        ("index_offset", "<i8"),
        ("samples", "<i8"),
        ("sha256", "S64"),
    ]
)
"""Entry of a shard in the manifest's table, 113 bytes."""


class ShardName(NamedTuple):
    """Fields that identify a shard."""

    input_shard: int
    split: Split
    length: int
    """Tokens of each sequence, without the one more that is stored."""
    number: int
    """Number of the shard among those of its input shard, split and length, from 0."""

    def path(self) -> str:
        """Return the path of the shard relative to the prepared directory."""
        return f"shards/{self.input_shard:06d}/{self.split}-L{self.length:07d}-{self.number:06d}.tar"


def shard_name(entry: Any) -> ShardName:
    """Return the name of the shard of a table entry (SHARD_DTYPE)."""
    split: Split = "held_out" if entry["held_out"] else "train"
    return ShardName(int(entry["input_shard"]), split, int(entry["length"]), int(entry["number"]))


_STORED_DTYPE = recfunctions.rename_fields(np.empty(0, dtype=SHARD_DTYPE), {"samples": "blocks"}).dtype
"""SHARD_DTYPE as format version 2 stores it, which calls samples blocks."""


def save_shard_table(file: Path, table: NDArray[np.void]) -> None:
    """Write a table of shards, SHARD_DTYPE [shards], as an npy file."""
    np.save(file, table.view(_STORED_DTYPE))


def load_shard_table(file: Path, lengths: Sequence[int], num_input_shards: int) -> NDArray[np.void]:
    """Return the table of shards, SHARD_DTYPE [shards], that `save_shard_table` wrote.

    Raises ValueError unless every entry can be one of a shard of these `lengths` and input shards: the sizes, counts
    and names that follow from the table are then within bounds, whoever wrote it.
    """
    table = read_array(file, _STORED_DTYPE, (None,)).view(SHARD_DTYPE)
    # Signed and wide, so that no difference or product of the bounds below overflows.
    sequences, sizes = table["sequences"].astype(np.float64), table["size_bytes"].astype(np.float64)
    bounds = {
        "input_shard": (np.diff(table["input_shard"].astype(np.int64), append=num_input_shards - 1) >= 0),
        "length": np.isin(table["length"], lengths),
        "sequences": (sequences > 0) & (sequences * (table["length"].astype(np.float64) + 1) * 2 <= sizes),
        "size_bytes": sizes < MAX_SHARD_BYTES,
        "samples": (table["samples"] > 0) & (table["samples"] <= table["sequences"]),
        "index_offset": (table["index_offset"] >= 0)
        & (table["index_offset"] + table["samples"].astype(np.float64) * INDEX_DTYPE.itemsize <= sizes),
        "sha256": np.array([is_sha256(value.decode("latin-1")) for value in table["sha256"].tolist()], dtype=np.bool_),
    }
    for name, fits in bounds.items():
        if not fits.all():
            wrong = int(np.argmin(fits))
            raise ValueError(f"{file}: shard {wrong} cannot have {name} = {table[name][wrong]}")
    return table


class BucketWriter:
    """Writer that appends sequences of one length and cuts them into samples and shards in `folder`.

    `counts` [vocab_size], if given, counts the targets. The writer is a context manager: leaving it finishes the last
    shard, leaving it by an exception only closes the open file.
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
        sample_rows = max(1, min(SAMPLE_TOKENS, shard_tokens) // name.length)
        self._sample = np.empty((sample_rows, name.length + 1), dtype=dtype)
        self._counts = counts
        # First piece of each row of the sample, and the number of pieces at the end: [rows + 1].
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
                # Closing flushes buffers, which may fail on the same full disk; the first error is the one to show.
                with suppress(OSError):
                    self._tar.close()

    def append(self, tokens: NDArray, pieces: list[tuple[int, int, int]]) -> None:
        """Add a sequence `tokens` [length + 1] with its `pieces` (document, offset in it, position in the sequence)."""
        self._sample[len(self._rows) - 1] = tokens
        self._pieces += pieces
        self._rows.append(len(self._pieces))
        self._rows_in_shard += 1
        # The last sample of a shard may be shorter than the others; no sample continues in the next shard.
        if self._rows_in_shard == self._shard_rows:
            self._finish_shard()
        elif len(self._rows) > len(self._sample):
            self._write_sample()

    def shards(self) -> NDArray[np.void]:
        """Return the table of the shards written, SHARD_DTYPE [shards]; call it after the context has ended."""
        return np.array(self._shards, dtype=SHARD_DTYPE)

    def _write_sample(self) -> None:
        if self._tar is None:
            self._tar = tarfile.open(  # noqa: SIM115  closed by _finish_shard, or on leaving the context
                self._folder / Path(self._name._replace(number=len(self._shards)).path()).name,
                "w",
                format=tarfile.USTAR_FORMAT,
            )
        tokens = self._sample[: len(self._rows) - 1]
        if self._counts is not None:
            # Every token but the first of a row is a target.
            self._counts += np.bincount(tokens[:, 1:].ravel(), minlength=len(self._counts))
        arrays = {
            "documents": np.array(self._pieces, dtype="<u4"),  # [pieces, 3]
            "rows": np.array(self._rows, dtype="<u4"),  # [rows + 1]
            "tokens": tokens,  # [rows, length + 1]
        }
        key = f"{len(self._index):06d}"
        offsets = [_add(self._tar, f"{key}.{name}.npy", array) for name, array in arrays.items()]
        self._index.append((len(tokens), *offsets))
        self._rows, self._pieces = [0], []

    def _finish_shard(self) -> None:
        if len(self._rows) > 1:
            self._write_sample()
        if self._tar is None:
            return
        index_offset = _add(self._tar, INDEX_MEMBER, np.array(self._index, dtype=INDEX_DTYPE))
        path = Path(str(self._tar.name))
        self._tar.close()
        self._tar = None
        sync(path)
        sequences = sum(rows for rows, *_ in self._index)
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
    """Add `array` to `tar` as an npy member; return the byte offset of its first element from the start of the tar."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    # A new TarInfo has time 0, no owner and mode 644, so the bytes depend on the array alone.
    member = tarfile.TarInfo(name)
    member.size = buffer.tell()
    buffer.seek(0)
    tar.addfile(member, buffer)
    # The member ends at tar.offset less its padding to whole tar blocks, and the array ends with the member.
    padded = -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return tar.offset - padded + member.size - array.nbytes
