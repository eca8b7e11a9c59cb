"""One shard, read by byte offsets.

Reads go through the file instead of a mapping of it: an error in a mapped page, such as a disk's or that of a file cut
short, would end the process by SIGBUS without a message, and could not be tried again.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import read_patiently
from .damage import wrong_content, wrong_size
from .shards import INDEX_DTYPE

ALIGNMENT = 64
"""Arrays in a shard begin at multiples of this number of bytes, by the headers of tar and npy."""


class _Descriptor:
    """An open file, closed when nothing refers to it any more: another thread may still read from it."""

    number = -1

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound now: at exit `os` may be gone
        if self.number >= 0:
            close(self.number)


class ShardFile:
    """Open shard of a bucket; several threads may read at once.

    `entry` is its entry in the manifest's table, `row_bytes` the size of a stored sequence. Raises DamagedDataError if
    size or index are not those of the manifest, and OSError if the file cannot be read.
    """

    def __init__(self, path: Path, entry: Any, row_bytes: int, command: str):
        self.path = path
        self.input_shard = int(entry["input_shard"])
        self._entry = entry
        self._command = command
        self._descriptor: _Descriptor | None = None
        size_bytes = int(entry["size_bytes"])
        error = read_patiently(path, lambda: wrong_size(path, size_bytes, self._sha256, command))
        if error is not None:
            # A file that has gone since the start is not damaged: its storage may be away.
            raise error if path.is_file() else FileNotFoundError(str(error))
        self.samples = np.empty(int(entry["samples"]), dtype=INDEX_DTYPE)
        """Index of the shard, INDEX_DTYPE [samples]."""
        self.read([(self.samples, int(entry["index_offset"]))])
        rows = self.samples["rows"]  # [samples]; all samples but the last have the same number of rows
        fits = (
            rows.min() > 0
            and rows.max() == rows[0] <= int(entry["sequences"])
            and (rows[:-1] == rows[0]).all()
            and rows.sum() == int(entry["sequences"])
        )
        for field, bytes_of_row in (("tokens_offset", row_bytes), ("rows_offset", 4), ("documents_offset", 0)):
            offsets = self.samples[field]
            fits &= bool((offsets >= 0).all() and (offsets % ALIGNMENT == 0).all())
            fits &= bool((offsets <= size_bytes - rows * bytes_of_row).all())
        if not fits:
            raise wrong_content(path, "its index does not fit it", self._sha256, command)

    @property
    def _sha256(self) -> str:
        return self._entry["sha256"].decode()

    def read(self, wanted: Iterable[tuple[NDArray, int]]) -> None:
        """Fill each array with the bytes from its offset on.

        An error is tried again on the file opened anew. Raises DamagedDataError if the file ends before, and OSError if
        it cannot be read.
        """
        wanted = list(wanted)

        def read() -> None:
            descriptor = self._descriptor = self._descriptor or _Descriptor(self.path)
            try:
                for array, offset in wanted:
                    left = array.reshape(-1).view(np.uint8)  # the bytes of the array that are not read yet
                    while left.size:
                        count = os.preadv(descriptor.number, [left.data], offset + array.nbytes - left.size)
                        if not count:
                            raise wrong_content(self.path, "it ends too early", self._sha256, self._command)
                        left = left[count:]
            except OSError:
                self._descriptor = None
                raise

        read_patiently(self.path, read)
