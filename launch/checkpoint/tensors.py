"""Reading ranges of tensors from the safetensors file of a rank, without mapping it into memory.

A disk that fails under a mapped file ends the process by SIGBUS; a read is an error that can be tried again.
"""

from __future__ import annotations

import json
import math
import os
from io import FileIO
from pathlib import Path
from typing import Any

from torch import Tensor

from ...data.files import read_patiently
from ...data.format.content import whole

_MAX_HEADER_BYTES = 1 << 30


class TensorFile:
    """The flat fp32 tensors of one safetensors file. Raises ValueError if its header does not describe the file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stream: FileIO | None = None
        self._offsets = read_patiently(file, self._read_header)

    def read_into(self, result: Tensor, name: str, first: int) -> None:
        """Read the elements from `first` on of tensor `name` into `result`, fp32 [numel] on the host.

        Raises ValueError if the file has fewer, and OSError if it cannot be read.
        """
        start, stop = self._offsets.get(name, (0, 0))
        start += 4 * first
        if start + result.nbytes > stop:
            raise ValueError(f"it has fewer elements of {name} than its manifest says")
        view = result.numpy().data.cast("B")
        read_patiently(self._file, lambda: self._fill(view, start))

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _fill(self, view: memoryview, offset: int) -> None:
        """Fill the view with the bytes of the file from `offset` on."""
        try:
            if self._stream is None:
                self._stream = self._file.open("rb", buffering=0)
            done = 0
            while done < len(view):
                if not (num_read := os.preadv(self._stream.fileno(), [view[done:]], offset + done)):
                    raise OSError("it ends early")
                done += num_read
        except OSError:
            self.close()  # a stale handle answers never again: the next attempt opens the file anew
            raise

    def _read_header(self) -> dict[str, tuple[int, int]]:
        """Return the first and the last offset of every tensor, in bytes from the start of the file."""
        size = self._file.stat().st_size
        length = bytearray(8)
        if size < len(length):
            raise ValueError(f"it has {size} bytes")
        self._fill(memoryview(length), 0)
        begin = 8 + int.from_bytes(length, "little")
        if begin > min(size, _MAX_HEADER_BYTES):
            raise ValueError(f"its header has {begin - 8:,} bytes")
        text = bytearray(begin - 8)
        self._fill(memoryview(text), 8)
        try:
            header = json.loads(text)
        except RecursionError as error:
            raise ValueError("its header is nested too deeply") from error
        if not isinstance(header, dict):
            raise ValueError("its header is no table")
        return {name: _offsets(name, entry, begin, size) for name, entry in header.items()}


def _offsets(name: str, entry: Any, begin: int, size: int) -> tuple[int, int]:
    """Return the first and the last offset of a tensor from its entry in the header, which ends at `begin`."""
    number = whole(0, size)
    match entry:
        case {"dtype": "F32", "shape": list(shape), "data_offsets": [start, stop]} if all(
            map(number, [*shape, start, stop])
        ):
            if start + 4 * math.prod(shape) == stop <= size - begin:
                return begin + start, begin + stop
    raise ValueError(f"{name!r:.80} = {entry!r:.80}")
