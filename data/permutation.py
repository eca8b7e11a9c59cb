"""A shuffle as arithmetic: a keyed bijection of range(size), evaluated only where it is asked for.

A generalised Feistel network permutes the pairs (left, right) of range(rows) x range(columns), the smallest nearly
square grid that holds `size`: each round adds, modulo its side, a function of the other one. Results outside the range,
fewer than one in sqrt(size), are sent through again until they fall inside (cycle walking), which keeps it a bijection
of range(size). See Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, sections 4 and 5. It needs
no memory for the order, and any entry of any pass costs the same, so a run resumes anywhere. Small ranges are sorted by
a keyed hash instead.
"""

import hashlib
from math import isqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Places that one item takes under 12,000 keys, for 3 to 10 entries: the worst chi-square is 40 standard deviations
# above its mean with four rounds, 6 with six, 2 with eight. Even, so that the sides end where they began.
ROUNDS = 8
MAX_SIZE = 1 << 40
SORTED_SIZE = 1 << 11
"""Up to this size all entries are put in order at once, which takes less time than the rounds' numpy calls."""


def permute(indices: ArrayLike, size: int, key: tuple[int | str, ...]) -> NDArray[np.int64]:
    """Return the places of `indices` (integers in [0, size), any shape) in the order that `key` names; same shape.

    Raises ValueError for a size outside [1, 2^40] and IndexError for an index outside the range.
    """
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"cannot permute {size} entries; the size must be in [1, 2^40]")
    asked = np.asarray(indices, dtype=np.int64)
    if asked.size and not (asked.min() >= 0 and asked.max() < size):
        raise IndexError(f"indices span [{asked.min()}, {asked.max()}], outside [0, {size})")
    round_keys = np.frombuffer(hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest(), dtype="<u8")
    if size <= SORTED_SIZE:
        # Scrambling 64 bits maps no two entries to one value, so their order is a permutation without ties.
        return np.argsort(mix_bits(mix_bits(np.arange(size, dtype=np.uint64) + round_keys[0]) ^ round_keys[1]))[asked]

    rows = isqrt(size - 1) + 1
    columns = -(-size // rows)
    places = _feistel(asked.astype(np.uint64).ravel(), rows, columns, round_keys)
    outside = np.flatnonzero(places >= size)
    while outside.size:
        places[outside] = _feistel(places[outside], rows, columns, round_keys)
        outside = outside[places[outside] >= size]
    return places.astype(np.int64).reshape(asked.shape)


def _feistel(values: NDArray[np.uint64], rows: int, columns: int, round_keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Permute range(rows * columns); each round is inverted by subtracting what it added."""
    left, right = np.divmod(values, np.uint64(columns))
    sides = np.uint64(rows), np.uint64(columns)
    for number, round_key in enumerate(round_keys):
        side = sides[number % 2]
        # The upper 32 bits, scaled to [0, side): sides are at most 2^20, so the product fits.
        added = ((mix_bits(right + round_key) >> np.uint64(32)) * side) >> np.uint64(32)
        total = left + added
        # The other side's turn next: they change places.
        left, right = right, total - side * (total >= side)
    return left * np.uint64(columns) + right


def mix_bits(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64 bits: SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014), arithmetic modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
