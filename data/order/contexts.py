"""Contexts along the path: the pairs (an input token and its target) of every document in every sequence.

The joined stream has the documents of a split along the path, without the pieces that are sequences of their own. A
context is a run of `length` pairs of the stream. The contexts together are the whole stream, so no pair is repeated or
lost; the end of the last context is filled with boundaries. Neighbours along the path share a context, but neighbouring
contexts are stored apart: the order of a bucket's stored sequences is a permutation keyed by the seed, so training that
reads shard after shard does not read neighbouring contexts together.

Contexts are cut without regard to documents, as in the paper, so a document may go on in the next context. Its piece
there has the token before it as its first input. The tail of a document whose beginning is a sequence of its own has
the boundary as its first input instead, which ends the document before it in the stream (see prepare/packing.py).

Example: documents A (5 pairs), B (9) and C (6) in contexts of 8 pairs; 4 boundaries fill the last context.

    stream   A A A A A B B B B B B B B B C C C C C C
    context  0               1               2
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
"""A document, and the offset of a pair in it: the first pair of a piece."""


class Layout(NamedTuple):
    """Layout of one source's documents in a split: the sequence in which each pair lies."""

    members: NDArray[np.void]
    """OWN_DTYPE [members], the documents of the joined stream, along the path, and their first pairs in it."""
    starts: NDArray[np.int64]
    """[members + 1], the position in the stream at which each member begins; the last one is the stream's length."""
    own: dict[int, NDArray[np.void]]
    """OWN_DTYPE [pieces] for each bucket: the pieces that are sequences of their own."""
    contexts: dict[int, NDArray[np.int64]]
    """int64 [contexts] for each bucket: the position in the stream at which each context begins."""

    def sequences(self, length: int) -> int:
        """Return the number of sequences in the bucket of `length`."""
        return len(self.own[length]) + len(self.contexts[length])

    def save(self, folder: Path, split: Split) -> None:
        """Write the arrays of a split to `folder`; the members come last."""
        for length in self.own:
            save(folder / f"{split}-own-{length}.npy", self.own[length])
            save(folder / f"{split}-contexts-{length}.npy", self.contexts[length])
        save(folder / f"{split}-starts.npy", self.starts)
        save(folder / f"{split}-members.npy", self.members)

    @classmethod
    def load(cls, folder: Path, split: Split, lengths: tuple[int, ...]) -> "Layout":
        """Return the layout that `save` wrote, with its arrays mapped."""

        def read(name: str) -> NDArray:
            return np.load(folder / f"{split}-{name}.npy", mmap_mode="r")

        return cls(
            read("members"),
            read("starts"),
            {length: read(f"own-{length}") for length in lengths},
            {length: read(f"contexts-{length}") for length in lengths},
        )


def layout_folder(partial: Path, source: int) -> Path:
    """Return the folder of the layouts of the source with this index, of ordered data made in `partial`."""
    return partial / "work" / "layout" / f"{source}"


def lay_in_context(path: NDArray[np.uint32], pairs: NDArray[np.int64], length: int) -> Layout:
    """Return the layout of the documents of `path` [n] in contexts of one length; document d has pairs[d] pairs."""
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
    """Return the layout of the documents of `path` [n] in which pieces of `lengths` are sequences of their own.

    A document is cut largest piece first, as in dataset decomposition. Tails and short documents are joined and fill
    the buckets that have the fewest tokens. Contexts of several lengths lie along the stream in an order keyed by
    `key`.
    """
    size, largest = pairs[path], lengths[-1]  # [documents]
    own: dict[int, list[NDArray]] = {length: [] for length in lengths}
    counts = size // largest
    # [pieces of the largest length]: the document of each, and its number within the document.
    whole = np.repeat(np.arange(len(path)), counts)
    nth = np.arange(len(whole)) - np.repeat(np.cumsum(counts) - counts, counts)
    own[largest].append(_own(path[whole], nth * largest))
    # The first `done` pairs of each document are in sequences of their own.
    done = counts * largest
    for length in reversed(lengths[:-1]):
        [here] = np.nonzero(size - done >= length)
        own[length].append(_own(path[here], done[here]))
        done[here] += length  # once is enough: fewer than 2 `length` pairs were left
    members, starts = _joined(path, done, size - done)
    pieces = {length: np.concatenate(found) for length, found in own.items()}
    filled = contexts_to_fill({length: length * len(found) for length, found in pieces.items()}, int(starts[-1]))
    cuts = np.repeat(list(filled), list(filled.values()))  # [contexts], the length of each
    cuts = cuts[permute(np.arange(len(cuts)), len(cuts), key=(*key, "lengths"))] if len(cuts) else cuts
    begins = np.cumsum(cuts) - cuts
    return Layout(members, starts, pieces, {length: begins[cuts == length].astype(np.int64) for length in lengths})


def contexts_to_fill(own_tokens: Mapping[int, int], joined_tokens: int) -> dict[int, int]:
    """Return the number of contexts of each length that hold `joined_tokens` and make the buckets most nearly equal.

    The buckets with the fewest tokens are raised to one common level; contexts of the shortest length hold the rest.
    """
    by_tokens = sorted(own_tokens, key=lambda length: (own_tokens[length], length))
    # Raise the `count` smallest buckets together until their level does not reach the next one.
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
    """Return the tokens [length + 1] of sequence `number` of a bucket, and its pieces.

    Sequences are numbered with the own pieces first, then the contexts. A piece is (document, offset of its first pair
    in the document, position of that pair in the sequence); filler has the document NO_DOCUMENT.
    """
    own = layout.own[length]
    if number < len(own):
        document, offset = own[number].item()
        return documents.tokens(document, offset, length), [(document, offset, 0)]
    first = int(layout.contexts[length][number - len(own)])
    member = int(np.searchsorted(layout.starts, first, side="right")) - 1
    row = np.full(length + 1, boundary_id, dtype=documents.manifest.dtype)
    pieces, position = [], 0
    # Pairs [0, position) of the sequence are filled; the next one belongs to `member`.
    while position < length and member < len(layout.members):
        document, base = layout.members[member].item()
        start, end = layout.starts[member : member + 2].tolist()
        offset, pairs = base + first + position - start, min(end, first + length) - first - position
        # Where a member begins, its first input is the boundary that is already there, for a tail too.
        begins = int(first + position == start)
        row[position + begins : position + pairs + 1] = documents.tokens(document, offset, pairs)[begins:]
        pieces.append((document, offset, position))
        position, member = position + pairs, member + 1
    if position < length:
        pieces.append((NO_DOCUMENT, 0, position))
    return row, pieces


def stored(layout: Layout, length: int, seed: int, split: Split, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the sequences of a bucket that are stored at `indices` [n] of the ordered data, as layout numbers [n]."""
    if not len(indices):
        return indices
    return permute(indices, layout.sequences(length), key=(seed, "contexts", split, length))


def _joined(
    path: NDArray[np.uint32], offsets: NDArray[np.int64], left: NDArray[np.int64]
) -> tuple[NDArray[np.void], NDArray[np.int64]]:
    """Return the members and starts of the joined stream: the `left` [n] pairs from `offsets` [n] of each document."""
    [some] = np.nonzero(left)  # a document that has no pair left is no member
    return _own(path[some], offsets[some]), np.concatenate([[0], np.cumsum(left[some])]).astype(np.int64)


def _own(documents: NDArray[np.uint32], offsets: NDArray[np.int64]) -> NDArray[np.void]:
    """Return (document, offset) as OWN_DTYPE [n]."""
    found = np.empty(len(documents), dtype=OWN_DTYPE)
    found["document"], found["offset"] = documents, offsets
    return found
