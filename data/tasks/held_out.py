"""Held-out documents of prepared data as the haystacks of tasks."""

from itertools import count

import numpy as np

from ..format.manifest import Manifest
from .draws import Draws
from .sample import Tokens


class HeldOut:
    """Held-out documents of prepared data. Raises ValueError if there are none."""

    def __init__(self, manifest: Manifest) -> None:
        # Longest first: a long haystack is then made of few pieces.
        buckets = [bucket for bucket in reversed(manifest.buckets("held_out")) if bucket.sequences]
        if not buckets:
            raise ValueError(
                f"{manifest.store.name}: has no held-out documents; prepare the data with a larger "
                "data.held_out_fraction"
            )
        self._readers = [manifest.reader(bucket) for bucket in buckets]
        self._boundary_id = manifest.boundary_id
        self._name = manifest.store.name

    def text(self, num_tokens: int, draws: Draws) -> Tokens:
        """Return tokens of documents in random order, without boundary tokens; all have been read before one is again.

        The result is int64 `[num_tokens]`. Raises ValueError if the documents have no tokens but boundaries.
        """
        found, left = [np.empty(0, dtype=np.int64)], num_tokens
        for passes in count():  # passes over all sequences that are done
            if passes and left == num_tokens:
                raise ValueError(
                    f"{self._name}: the held-out documents have no tokens but boundaries; prepare the data with a "
                    "larger data.held_out_fraction"
                )
            for reader in self._readers:
                for sequence in draws.distinct(reader.sequences, reader.sequences):
                    if left <= 0:
                        return np.concatenate(found)[:num_tokens]
                    row = reader.read([sequence])[0].astype(np.int64)  # [length + 1]
                    found.append(row[row != self._boundary_id])
                    left -= len(found[-1])
        raise AssertionError("unreachable")

    def continued(self, length: int, draws: Draws) -> tuple[Tokens, Tokens, int]:
        """Return two sequences of the bucket of this length, int64 `[length + 1]` each, and the cut of both.

        The cut is in the middle; where the sequence holds several documents, it is the begin of the first document
        after the middle. Raises ValueError if the bucket has fewer than two held-out sequences.
        """
        readers = [reader for reader in self._readers if reader.length == length and reader.sequences > 1]
        if not readers:
            raise ValueError(
                f"{self._name}: has no two held-out sequences of {length} tokens to compare; prepare more of them, or "
                "leave out the task prefix"
            )
        chosen = draws.distinct(readers[0].sequences, 2)
        row, other = readers[0].read(chosen).astype(np.int64)
        [starts] = readers[0].document_starts(chosen[:1])
        behind = [start for start in starts if length // 2 <= start <= length - 2]  # leaves 2 targets or more
        return row, other, behind[0] if behind else length // 2
