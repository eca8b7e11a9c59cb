"""Lengths of held-out documents, known from their pieces."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...data.format.manifest import Manifest
from ...data.format.reader import SequenceReader

AT_ONCE = 4096
"""Number of sequences whose tables of pieces are read at once."""


class DocumentLengths:
    """Lengths of the held-out documents of prepared data, in trained tokens.

    A document is as long as its last stored piece reaches; a remainder that the data leave out does not count.
    """

    def __init__(self, manifest: Manifest) -> None:
        keys, ends = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]  # for data without any
        for bucket in manifest.buckets("held_out"):
            reader = manifest.reader(bucket)
            for first in range(0, reader.sequences, AT_ONCE):
                numbers = np.arange(first, min(first + AT_ONCE, reader.sequences))
                for pieces in reader.pieces(numbers):
                    keys.append(_keys(pieces))
                    ends.append(pieces[:, 2] + _lengths(pieces, reader.length))  # positions in documents
        # Keys [documents], ascending, and for each piece the index of its document among them.
        self._documents, which = np.unique(np.concatenate(keys), return_inverse=True)
        self._lengths = np.zeros(len(self._documents), dtype=np.int64)
        # A document may have pieces in several buckets: its length is the greatest end of any.
        np.maximum.at(self._lengths, which, np.concatenate(ends))

    @property
    def longest(self) -> int:
        """Length of the longest document; 0 without any."""
        return int(self._lengths.max(initial=0))

    def of_targets(self, reader: SequenceReader, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the length of the document of each target of sequences `numbers` [b], int64 `[b, length]`."""
        rows = []
        for pieces in reader.pieces(numbers):
            lengths = self._lengths[np.searchsorted(self._documents, _keys(pieces))]  # [pieces]
            rows.append(np.repeat(lengths, _lengths(pieces, reader.length)))  # [length]
        return np.stack(rows)


def _keys(pieces: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a number for the document of each piece; records have 32 bits."""
    return (pieces[:, 0] << 32) | pieces[:, 1]


def _lengths(pieces: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Return the number of targets of each piece of a sequence of `length`."""
    return np.diff(pieces[:, 3], append=length)
