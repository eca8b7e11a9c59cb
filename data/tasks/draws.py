"""Random choices that are equal on every machine and in every version of numpy."""

import hashlib
import json
import uuid
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


class Draws:
    """Random choices, a pure function of the key and of the calls made before."""

    def __init__(self, *key: int | str) -> None:
        digest = hashlib.sha256(json.dumps(key).encode()).digest()
        # Only random() is used: the one method of the generator whose values are the same in every version of numpy.
        self._random = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big"))).random

    def below(self, stop: int) -> int:
        """Return one of 0, ..., stop - 1."""
        return int(self._random() * stop)

    def integers(self, stop: int, count: int) -> NDArray[np.int64]:
        """Return `count` independent choices among 0, ..., stop - 1, int64 [count]."""
        return (self._random(count) * stop).astype(np.int64)

    def choice(self, values: Sequence[T]) -> T:
        """Return one of the values."""
        return values[self.below(len(values))]

    def distinct(self, stop: int, count: int) -> list[int]:
        """Return `count` different numbers of 0, ..., stop - 1, in random order. Raises ValueError for too many."""
        if count > stop:
            raise ValueError(
                f"count = {count}: only {stop} different numbers are below {stop}; ask for at most as many"
            )
        return np.argsort(self._random(stop), kind="stable")[:count].tolist()  # stable: ties have one order everywhere

    def shuffled(self, values: Sequence[T]) -> list[T]:
        """Return the values in random order."""
        return [values[index] for index in self.distinct(len(values), len(values))]

    def letters(self, alphabet: str, length: int) -> str:
        """Return a random word of `length` letters."""
        return "".join(alphabet[index] for index in self.integers(len(alphabet), length))

    def digits(self, length: int) -> str:
        """Return a random number of `length` digits, the first of which is not 0."""
        return "123456789"[self.below(9)] + self.letters("0123456789", length - 1)

    def uuid(self) -> str:
        """Return a random UUID, version 4."""
        words = self.integers(1 << 32, 4).tolist()  # a draw has 53 bits, and a UUID 128
        return str(uuid.UUID(int=sum(word << (32 * index) for index, word in enumerate(words)), version=4))


def different(draw: Callable[[], str], count: int) -> list[str]:
    """Return `count` different texts, each made by `draw`."""
    found: dict[str, None] = {}
    # Ends if `draw` can make `count` different texts; callers draw from many more.
    while len(found) < count:
        found[draw()] = None
    return list(found)
