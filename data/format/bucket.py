"""The sequences of one length in prepared data, and each source's part of them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Part:
    """Sequences of one source in a bucket: adjacent shards of the bucket's table."""

    source: str
    """Name of the source."""
    first_shard: int
    """Index of the source's first shard in the bucket's table."""
    num_shards: int
    """Number of the source's shards, which follow it."""
    sequences: int
    """Number of sequences in these shards."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Bucket:
    """All sequences of one length in one split."""

    length: int
    shards: NDArray[np.void]
    """The bucket's part of the table, SHARD_DTYPE [shards], ordered by input shard."""

    parts: tuple[Part, ...]
    """Part of each source, in order, including a source without sequences."""

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return sum(part.sequences for part in self.parts)

    @property
    def tokens(self) -> int:
        """Number of trained tokens: `length` for each sequence, though length + 1 are stored."""
        return self.length * self.sequences
