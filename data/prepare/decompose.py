"""Dataset decomposition: which split a document belongs to, and into which pieces it is cut.

A document of n text tokens x is the stream B x1 ... xn B, where B is the boundary token: n + 1 (input, target) pairs,
each text token and the end being a target once. The pairs are cut into adjacent pieces whose lengths are powers of
two, largest first, so that a sequence holds one document and nothing is packed, padded or masked
(arXiv 2405.13226, section 3). A piece of L pairs is stored as L + 1 tokens: no target is lost at a cut.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

from ..format.document import Split


class Piece(NamedTuple):
    """Adjacent pairs of one document: `offset` is the first pair's place in it, `length` their number."""

    offset: int
    length: int


def decompose(num_pairs: int, lengths: Sequence[int], shuffled: random.Random | None = None) -> list[Piece]:
    """Cut `num_pairs` pairs into adjacent pieces of the given lengths, ascending powers of two, largest first.

    The largest length is repeated while it fits; the rest follows its binary digits. What is shorter than the smallest
    length is left over: the pieces cover the pairs [0, pieces[-1].offset + pieces[-1].length).

    With `shuffled`, while twice the largest length is left, the next length is drawn with odds 1 / length, as the
    paper's released code does (`make_dd_buckets.py`): the expected tokens of all lengths are equal.
    """
    pieces = []
    offset = 0
    if shuffled is not None:
        while num_pairs - offset >= 2 * lengths[-1]:
            # random() is the generator's one method whose values no version of Python changes.
            length = _drawn_by_inverse_length(shuffled.random(), lengths)
            pieces.append(Piece(offset, length))
            offset += length
    for length in reversed(lengths):
        while num_pairs - offset >= length:
            pieces.append(Piece(offset, length))
            offset += length
    return pieces


def _drawn_by_inverse_length(draw: float, lengths: Sequence[int]) -> int:
    odds = [lengths[-1] // length for length in lengths]
    left = int(draw * sum(odds))
    for length, chance in zip(lengths, odds, strict=True):
        left -= chance
        if left < 0:
            return length
    raise AssertionError(f"a draw of {draw} is not in [0, 1)")


def split_of(digest: bytes, seed: int, held_out_fraction: float) -> Split:
    """Return the split of the document with this content digest (16 bytes).

    A pure function of the content: equal documents are never in both splits, and more documents move no earlier ones.
    """
    # The digest is uniform; multiplying by an odd number keeps it so and gives every seed its own choice.
    place = (int.from_bytes(digest[:8], "little") + seed) * 0x9E3779B97F4A7C15 % 2**64
    place = (place ^ (place >> 32)) * 0xD6E8FEB86659FD93 % 2**64
    return "held_out" if place < held_out_fraction * 2**64 else "train"
