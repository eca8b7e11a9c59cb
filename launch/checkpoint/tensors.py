"""Safetensors files: reading ranges of tensors, without mapping the file into memory, and writing tensors one by one.

A disk that fails under a mapped file ends the process by SIGBUS; a read is an error that can be tried again. The
library's own writer would hold a second copy of all tensors, and the file would have to be read again for its hash.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...data.files import read_patiently
from ...data.format.content import whole

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Data types of weights, by their names in safetensors."""
_MAX_HEADER_BYTES = 1 << 30
_CHUNK_BYTES = 1 << 24


class StoredTensor(NamedTuple):
    """A tensor as the header of its file describes it."""

    dtype: str
    """Data type in the words of safetensors."""
    shape: tuple[int, ...]
    offset: int
    """First byte, from the start of the file."""


class TensorFile:
    """The tensors of one safetensors file. Raises ValueError if its header does not describe the file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stream: FileIO | None = None
        self.tensors: Mapping[str, StoredTensor] = read_patiently(file, self._read_header)

    def read_into(self, result: Tensor, name: str, first: int) -> None:
        """Read the elements from `first` on of tensor `name`, flattened, into `result`, fp32 [numel] on the host.

        Raises ValueError if the file has fewer, or none of a data type for weights, and OSError if it cannot be read.
        """
        stored = self.tensors.get(name)
        if stored is None or first + result.numel() > math.prod(stored.shape):
            raise ValueError(f"it has fewer elements of {name} than its manifest says")
        if (dtype := DTYPES.get(stored.dtype)) is None:
            raise ValueError(f"{name} is {stored.dtype:.80}, and weights are {', '.join(DTYPES)}")
        raw = result if dtype == result.dtype else torch.empty(result.shape, dtype=dtype)
        view = raw.view(torch.uint8).numpy().data  # raw's own bytes, not a copy
        read_patiently(self._file, lambda: self._fill(view, stored.offset + first * dtype.itemsize))
        if raw is not result:
            result.copy_(raw)

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
            while done < len(view):  # a read may return fewer bytes than it is asked for
                if not (num_read := os.preadv(self._stream.fileno(), [view[done:]], offset + done)):
                    raise OSError("it ends early")
                done += num_read
        except OSError:
            self.close()  # a stale handle never works again, so the next attempt opens the file anew
            raise

    def _read_header(self) -> dict[str, StoredTensor]:
        """Return the description of every tensor."""
        size = self._file.stat().st_size
        length = bytearray(8)  # of the header: u64, little-endian
        if size < len(length):
            raise ValueError(f"it has {size} bytes")
        self._fill(memoryview(length), 0)
        begin = 8 + int.from_bytes(length, "little")  # first byte of the data
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
        header.pop("__metadata__", None)
        return {name: _stored(name, entry, begin, size) for name, entry in header.items()}


def _stored(name: str, entry: Any, begin: int, size: int) -> StoredTensor:
    """Return a tensor from its entry in the header, which ends at `begin`."""
    number = whole(0, size)
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, stop]} if all(
            map(number, [*shape, start, stop])
        ):
            # Tensors of other types are never read.
            num_bytes = math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else stop - start
            if start + num_bytes == stop <= size - begin:
                return StoredTensor(dtype, tuple(shape), begin + start)
    raise ValueError(f"{name!r:.80} = {entry!r:.80}")


def write_safetensors(
    file: Path, tensors: Mapping[str, Tensor], progress: Callable[[], None] = lambda: None
) -> tuple[int, str]:
    """Write fp32 host tensors and flush them; return the size in bytes and the SHA-256.

    `progress` is called after every chunk.
    """
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    described = {name: ("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_one_by_one(file, described, tensors.values(), progress)


def write_one_by_one(
    file: Path,
    described: Mapping[str, tuple[str, tuple[int, ...]]],
    tensors: Iterable[Tensor],
    progress: Callable[[], None] = lambda: None,
    metadata: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Write the tensors of these data types and shapes, each when it is made; return the size in bytes and the SHA-256.

    Types with more bytes come first, so that every tensor begins at a multiple of its element's size.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset, sizes = 0, [DTYPES[dtype].itemsize for dtype, _ in described.values()]
    assert sizes == sorted(sizes, reverse=True)
    for name, (dtype, shape) in described.items():
        num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8 bytes
    digest, num_bytes = hashlib.sha256(), 0
    with file.open("wb") as stream:

        def put(part: bytes | memoryview) -> None:
            nonlocal num_bytes
            stream.write(part)
            digest.update(part)
            num_bytes += len(part)
            progress()

        put(struct.pack("<Q", len(text)) + text)
        for (dtype, shape), tensor in zip(described.values(), tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == (DTYPES[dtype], shape)
            view = tensor.contiguous().view(-1).view(torch.uint8).numpy().data  # without a copy
            for start in range(0, len(view), _CHUNK_BYTES):
                put(view[start : start + _CHUNK_BYTES])
        stream.flush()
        os.fsync(stream.fileno())
    return num_bytes, digest.hexdigest()
