"""A shuffle as arithmetic: a keyed bijection of range(size), evaluated only where it is asked for.

A balanced Feistel network permutes the smallest even number of bits that holds `size`; results outside the range are
sent through again until they fall inside (cycle walking), which keeps it a bijection of range(size). See Black and
Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, sections 4 and 5. It needs no memory for the order, and
any entry of any pass costs the same, so a run resumes anywhere.
"""

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Places that one item takes under 12,000 keys, for 3 to 10 entries: the worst chi-square is 83 standard deviations
# above its mean with four rounds, 4 with six, 0.4 with eight.
ROUNDS = 8
MAX_SIZE = 1 << 40


def permute(indices: ArrayLike, size: int, key: tuple[int | str, ...]) -> NDArray[np.int64]:
    """Return the places of `indices` (integers in [0, size), any shape) in the order that `key` names; same shape.

    Raises ValueError for a size outside [1, 2^40] and IndexError for an index outside the range.
    """
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"cannot permute {size} entries; the size must be in [1, 2^40]")
    asked = np.asarray(indices, dtype=np.int64)
    if asked.size and not (asked.min() >= 0 and asked.max() < size):
        raise IndexError(f"indices span [{asked.min()}, {asked.max()}], outside [0, {size})")
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    round_keys = np.frombuffer(hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest(), dtype="<u8")

    places = _feistel(asked.astype(np.uint64).ravel(), half_bits, round_keys)
    # The domain is less than four times the range, so three passes in four outside it is the worst case.
    outside = np.flatnonzero(places >= size)
    while outside.size:
        places[outside] = _feistel(places[outside], half_bits, round_keys)
        outside = outside[places[outside] >= size]
    return places.astype(np.int64).reshape(asked.shape)


def _feistel(values: NDArray[np.uint64], half_bits: int, round_keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Permute the integers of 2 * half_bits bits; each round is inverted by running it backwards."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right + round_key) & mask)
    return (left << shift) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64 bits: SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014), arithmetic modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
