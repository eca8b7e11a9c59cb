"""Dataset decomposition: the split of a document, and its pieces.

A document of n text tokens x is the stream B x1 ... xn B, where B is the boundary token. It has n + 1 (input, target)
pairs, in which each text token and the end of the document are a target once. The pairs are cut into adjacent pieces
whose lengths are powers of two, largest first, so that a sequence holds one document and nothing is packed, padded or
masked (arXiv 2405.13226, section 3). A piece of L pairs is stored as L + 1 tokens, so that no target is lost at a cut.
"""

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from ..format.document import Split


class Piece(NamedTuple):
    """Adjacent pairs of one document: the index of the first pair in the document, and the number of pairs."""

    offset: int
    length: int


def decompose(num_pairs: int, lengths: Sequence[int], shuffled: random.Random | None = None) -> list[Piece]:
    """Return adjacent pieces of `num_pairs` pairs, largest first; `lengths` are ascending powers of two.

    The largest length is repeated as long as it fits, and the binary digits of the remainder give the shorter pieces.
    Fewer pairs than the smallest length are left over: the pieces cover [0, pieces[-1].offset + pieces[-1].length).

    With `shuffled`, as long as twice the largest length is left, the next length is drawn with odds 1 / length, so that
    the expected number of tokens is equal for all lengths. The paper's released code does so (`make_dd_buckets.py`).
    Raises ValueError if there are no lengths, or if they do not ascend from 1 or more.
    """
    if not lengths or lengths[0] < 1 or any(a >= b for a, b in pairwise(lengths)):
        raise ValueError(
            f"lengths = {list(lengths)}: must ascend from 1 or more; sort them, and leave out those below 1"
        )
    pieces = []
    offset = 0  # invariant: `pieces` cover the pairs [0, offset)
    if shuffled is not None:
        while num_pairs - offset >= 2 * lengths[-1]:
            # random() is the only method of the generator whose values are the same in every version of Python.
            length = _drawn_by_inverse_length(shuffled.random(), lengths)
            pieces.append(Piece(offset, length))
            offset += length
    for length in reversed(lengths):
        while num_pairs - offset >= length:
            pieces.append(Piece(offset, length))
            offset += length
    return pieces


def _drawn_by_inverse_length(draw: float, lengths: Sequence[int]) -> int:
    """Return the length that `draw`, uniform in [0, 1), selects with odds 1 / length."""
    odds = [lengths[-1] // length for length in lengths]
    left = int(draw * sum(odds))
    for length, chance in zip(lengths, odds, strict=True):
        left -= chance
        if left < 0:
            return length
    raise AssertionError(f"a draw of {draw} is not in [0, 1)")


def split_of(digest: bytes, seed: int, held_out_fraction: float) -> Split:
    """Return the split of the document whose content has hash `digest` (16 bytes).

    It is a function of the content and the seed only: equal documents are in the same split, and added documents do not
    move the others.
    """
    # Multiplication by an odd number is a bijection modulo 2^64: a uniform digest stays uniform, and each seed gives
    # another choice.
    mixed = (int.from_bytes(digest[:8], "little") + seed) * 0x9E3779B97F4A7C15 % 2**64
    mixed = (mixed ^ (mixed >> 32)) * 0xD6E8FEB86659FD93 % 2**64
    return "held_out" if mixed < held_out_fraction * 2**64 else "train"
