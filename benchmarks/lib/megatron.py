"""Megatron's indexed data sets, as Megatron-LM writes them."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np


def write_megatron(prefix: Path, ids: np.ndarray, lengths: np.ndarray) -> None:
    """Write 16-bit ids as PREFIX.bin and PREFIX.idx, with one piece for each document of `lengths`."""
    ids.tofile(prefix.with_suffix(".bin"))
    with prefix.with_suffix(".idx").open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX", 1, 8, len(lengths), len(lengths) + 1))
        lengths.astype("<i4").tofile(file)
        ((np.cumsum(lengths) - lengths) * 2).astype("<i8").tofile(file)
        np.arange(len(lengths) + 1, dtype="<i8").tofile(file)
