"""The path becomes contexts: which pairs of which document lie in which sequence, as arithmetic, and their shards.

The documents of a split, or what of them is not a sequence of its own, lie end to end along the path: the joined
stream. A context is a run of its pairs; together they are the whole of it, so nothing is repeated and nothing lost;
only the last one is filled up with boundaries. Neighbours along the path come into one context, neighbouring contexts
do not stay together: a bucket's sequences are stored in an order keyed by the seed, so training that reads shard after
shard does not meet them in a row either.

A context is cut without looking at documents, so one may end in the next context, as in the paper; its part there has
the token before as its first input. A tail whose beginning is a sequence elsewhere begins with the boundary instead,
which the document before it ended with (see packing.py).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..format.document import NO_DOCUMENT, Split
from ..permutation import permute
from .documents import Documents, save

OWN_DTYPE = np.dtype([("document", "<u4"), ("offset", "<i8")])
"""Pairs of one document from `offset` on."""


class Layout(NamedTuple):
    """Where a split's pairs go."""

    members: NDArray[np.void]
    """OWN_DTYPE [members], the joined stream's documents along the path, and from which pair on."""
    starts: NDArray[np.int64]
    """[members + 1], where each begins in the stream."""
    own: dict[int, NDArray[np.void]]
    """By bucket: the pieces that are sequences of their own, OWN_DTYPE."""
    contexts: dict[int, NDArray[np.int64]]
    """By bucket: where its contexts begin in the stream."""

    def sequences(self, length: int) -> int:
        """Return how many sequences a bucket has."""
        return len(self.own[length]) + len(self.contexts[length])

    def save(self, folder: Path, split: Split) -> None:
        """Write the arrays, the members last."""
        for length in self.own:
            save(folder / f"{split}-own-{length}.npy", self.own[length])
            save(folder / f"{split}-contexts-{length}.npy", self.contexts[length])
        save(folder / f"{split}-starts.npy", self.starts)
        save(folder / f"{split}-members.npy", self.members)

    @classmethod
    def load(cls, folder: Path, split: Split, lengths: tuple[int, ...]) -> "Layout":
        """Map what `save` wrote."""

        def read(name: str) -> NDArray:
            return np.load(folder / f"{split}-{name}.npy", mmap_mode="r")

        return cls(
            read("members"),
            read("starts"),
            {length: read(f"own-{length}") for length in lengths},
            {length: read(f"contexts-{length}") for length in lengths},
        )


def lay_in_context(path: NDArray[np.uint32], pairs: NDArray[np.int64], length: int) -> Layout:
    """Lay out the path's documents [n], of pairs[document] each, in contexts of one length."""
    members, starts = _joined(path, np.zeros(len(path), dtype=np.int64), pairs[path])
    return Layout(
        members,
        starts,
        {length: np.empty(0, dtype=OWN_DTYPE)},
        {length: np.arange(0, starts[-1], length, dtype=np.int64)},
    )


def lay_long_buckets(
    path: NDArray[np.uint32], pairs: NDArray[np.int64], lengths: tuple[int, ...], key: tuple[int | str, ...]
) -> Layout:
    """Lay out the path's documents [n]: pieces of the long `lengths` are sequences, what is left is joined.

    A document is cut largest piece first, as dataset decomposition cuts it; joined documents and tails fill the buckets
    that have the fewest tokens. Contexts of several lengths follow each other along the path in a keyed order.
    """
    size, largest = pairs[path], lengths[-1]
    own: dict[int, list[NDArray]] = {length: [] for length in lengths}
    counts = size // largest
    whole = np.repeat(np.arange(len(path)), counts)
    nth = np.arange(len(whole)) - np.repeat(np.cumsum(counts) - counts, counts)
    own[largest].append(_pieces(path[whole], nth * largest))
    done = counts * largest
    for length in reversed(lengths[:-1]):
        [here] = np.nonzero(size - done >= length)
        own[length].append(_pieces(path[here], done[here]))
        done[here] += length
    members, starts = _joined(path, done, size - done)
    pieces = {length: np.concatenate(found) for length, found in own.items()}
    filled = contexts_to_fill({length: length * len(found) for length, found in pieces.items()}, int(starts[-1]))
    cuts = np.repeat(list(filled), list(filled.values()))
    cuts = cuts[permute(np.arange(len(cuts)), len(cuts), key=(*key, "lengths"))] if len(cuts) else cuts
    begins = np.cumsum(cuts) - cuts
    return Layout(members, starts, pieces, {length: begins[cuts == length].astype(np.int64) for length in lengths})


def contexts_to_fill(own_tokens: Mapping[int, int], joined_tokens: int) -> dict[int, int]:
    """Return how many contexts of each length hold `joined_tokens` so that the buckets' tokens are most nearly equal.

    The buckets with the fewest tokens are raised to one level; what that leaves over fills contexts of the shortest
    length, the last of them not to its end.
    """
    by_tokens = sorted(own_tokens, key=lambda length: (own_tokens[length], length))
    left, level = joined_tokens, 0
    for count in range(1, len(by_tokens) + 1):
        raised = by_tokens[:count]
        level = (left + sum(own_tokens[length] for length in raised)) // count
        if count == len(by_tokens) or level <= own_tokens[by_tokens[count]]:
            break
    contexts = {length: max(0, level - tokens) // length for length, tokens in own_tokens.items()}
    left -= sum(length * count for length, count in contexts.items())
    contexts[min(contexts)] += -(-left // min(contexts))
    return contexts


def read_sequence(
    documents: Documents, layout: Layout, length: int, number: int, boundary_id: int
) -> tuple[NDArray[np.unsignedinteger], list[tuple[int, int, int]]]:
    """Return sequence `number` of a bucket, own ones first: its tokens [length + 1] and its pieces.

    A piece is (document, first pair's offset in it, place in the sequence).
    """
    own = layout.own[length]
    if number < len(own):
        document, offset = own[number].item()
        return documents.tokens(document, offset, length), [(document, offset, 0)]
    first = int(layout.contexts[length][number - len(own)])
    member = int(np.searchsorted(layout.starts, first, side="right")) - 1
    row = np.full(length + 1, boundary_id, dtype=documents.manifest.dtype)
    pieces, place = [], 0
    while place < length and member < len(layout.members):
        document, base = layout.members[member].item()
        start, end = layout.starts[member : member + 2].tolist()
        offset, pairs = base + first + place - start, min(end, first + length) - first - place
        # A member's first input is the boundary, which is there, also of a tail.
        begins = int(first + place == start)
        row[place + begins : place + pairs + 1] = documents.tokens(document, offset, pairs)[begins:]
        pieces.append((document, offset, place))
        place, member = place + pairs, member + 1
    if place < length:
        pieces.append((NO_DOCUMENT, 0, place))
    return row, pieces


def stored(layout: Layout, length: int, seed: int, split: Split, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return which sequences of a bucket are stored at `places`."""
    if not len(places):
        return places
    return permute(places, layout.sequences(length), key=(seed, "contexts", split, length))


def _joined(
    path: NDArray[np.uint32], offsets: NDArray[np.int64], left: NDArray[np.int64]
) -> tuple[NDArray[np.void], NDArray[np.int64]]:
    [some] = np.nonzero(left)
    return _pieces(path[some], offsets[some]), np.concatenate([[0], np.cumsum(left[some])]).astype(np.int64)


def _pieces(documents: NDArray[np.uint32], offsets: NDArray[np.int64]) -> NDArray[np.void]:
    found = np.empty(len(documents), dtype=OWN_DTYPE)
    found["document"], found["offset"] = documents, offsets
    return found
