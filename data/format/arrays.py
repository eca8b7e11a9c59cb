"""Reading npy files from outside: nothing is allocated before the header fits the file, and nothing is unpickled."""

import math
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ..files import read_patiently

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_array(file: Path, dtype: np.dtype, shape: tuple[int | None, ...]) -> NDArray:
    """Return the array of an npy file, of `shape`, in which None stands for any number.

    Raises ValueError unless the file holds an array of this type and shape and nothing else, and OSError if it cannot
    be read.
    """
    return read_patiently(file, lambda: _read(file, dtype, shape))


def _read(file: Path, dtype: np.dtype, shape: tuple[int | None, ...]) -> NDArray:
    with file.open("rb") as stream:
        try:
            found, fortran, stored = _HEADERS[npy.read_magic(stream)](stream)
        except OSError:
            raise
        except Exception as error:  # numpy reads a header as Python, whose parser has errors of its own
            raise ValueError(f"{file}: is not an npy file ({str(error)[:80]!r})") from error
        fits = len(found) == len(shape) and all(
            size >= 0 and wanted in (None, size) for size, wanted in zip(found, shape, strict=True)
        )
        size_bytes = stream.tell() + math.prod(found) * dtype.itemsize
        # In one dimension both orders of elements are the same.
        if stored != dtype or (fortran and len(found) > 1) or not fits or size_bytes != file.stat().st_size:
            raise ValueError(
                f"{file}: its header says {str(list(found))[:80]} of type {str(stored)[:80]}, which is not what a file "
                f"of this name and of {file.stat().st_size} bytes holds"
            )
        array = np.empty(math.prod(found), dtype)
        # np.fromfile would return fewer elements after an error of the disk, and that would look like damage.
        if stream.readinto(array.view(np.uint8).data) != array.nbytes:
            raise OSError("it ends before its size")
        return array.reshape(found)
