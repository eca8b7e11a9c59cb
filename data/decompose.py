"""Dataset decomposition: which split a document belongs to, and into which pieces it is cut.

A document of n text tokens x is the stream B x1 ... xn B, where B is the boundary token: n + 1 (input, target) pairs,
each text token and the end being a target once. The pairs are cut into adjacent pieces whose lengths are powers of
two, largest first, so that a sequence holds one document and nothing is packed, padded or masked
(arXiv 2405.13226, section 3). A piece of L pairs is stored as L + 1 tokens: no target is lost at a cut.
"""

import hashlib
from typing import Literal, NamedTuple

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")


class Piece(NamedTuple):
    """Adjacent pairs of one document: `offset` is the first pair's place in it, `length` their number."""

    offset: int
    length: int


def bucket_lengths(min_tokens: int, max_tokens: int) -> tuple[int, ...]:
    """Return the powers of two from `min_tokens` to `max_tokens`, both powers of two and included."""
    return tuple(1 << power for power in range(min_tokens.bit_length() - 1, max_tokens.bit_length()))


def decompose(num_pairs: int, lengths: tuple[int, ...]) -> list[Piece]:
    """Cut `num_pairs` pairs into adjacent pieces of the given ascending lengths, largest first.

    The largest length is repeated while it fits; the rest follows its binary digits. What is shorter than the smallest
    length is left over: the pieces cover the pairs [0, pieces[-1].offset + pieces[-1].length).
    """
    pieces = []
    offset = 0
    for length in reversed(lengths):
        while num_pairs - offset >= length:
            pieces.append(Piece(offset, length))
            offset += length
    return pieces


def split_of(document: int, seed: int, held_out_fraction: float) -> Split:
    """Return the split of document number `document`: a pure function, so more documents never move earlier ones."""
    digest = hashlib.blake2b(f"{seed}/{document}".encode(), digest_size=8).digest()
    return "held_out" if int.from_bytes(digest, "little") < held_out_fraction * 2**64 else "train"
