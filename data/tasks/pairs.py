"""Keys and values of random UUIDs: retrieval of one value, and threads through them (Needle Threading, 2411.05000)."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from .draws import Draws
from .material import Material
from .sample import Sample, Segment, too_short
from .task import depths, fitting, listed, question


@dataclass(frozen=True)
class Pairs:
    """A JSON object of UUID pairs, and a question for the values at the ends of threads.

    A thread starts at a key; as long as its value is a key of the object too, it goes on there. A thread of one hop is
    the retrieval of a value.
    """

    hops: int = 1
    """Number of pairs of each thread."""
    threads: int = 1
    """Number of threads, whose last values are asked for in the order of their start keys."""
    direction: Literal["forward", "reverse"] = "forward"
    """Order in which the pairs of a thread come in the object."""
    any_order: bool = False

    def make(self, material: Material, length: int, number: int, distractors: int, draws: Draws) -> Sample:
        """Return a sample, as `Task.make` says; it has a depth if it is a retrieval."""
        threads = [[draws.uuid() for _ in range(self.hops + 1)] for _ in range(self.threads)]  # [thread][hops + 1]
        wrong = [[draws.uuid() for _ in range(self.threads)] for _ in range(distractors)]
        depth = depths(number, 1, draws)[0] if self.hops * self.threads == 1 else None

        def line(key: str, value: str) -> str:
            return f'"{key}": "{value}",\n'

        # Wrong values are in the object too, under other keys.
        other_lines = [line(draws.uuid(), value) for chosen in wrong for value in chosen]
        in_thread = material.encode([line(*pair) for thread in threads for pair in pairwise(thread)])

        def context(tokens: int) -> list[Segment]:
            others = material.encode(other_lines)
            left = tokens - sum(map(len, [*in_thread, *others]))
            lines = [*others, *fitting(material, left, lambda: line(draws.uuid(), draws.uuid()))]
            if left < 0:
                pairs = "1 pair" if len(in_thread) == 1 else f"{len(in_thread)} pairs"
                raise too_short(length, f"no room for {pairs} and those of the distractors")
            lines = draws.shuffled(lines)
            size = len(lines) + len(in_thread)
            if depth is None:
                at = np.reshape(draws.distinct(size, len(in_thread)), (self.threads, self.hops))  # [thread, hop]
                at = np.sort(at, axis=1)[:, :: 1 if self.direction == "forward" else -1].flatten()
            else:
                at = np.array([round(depth * (size - 1))])
            placed = dict(zip(at.tolist(), in_thread, strict=True))  # index of a line → its tokens
            rest = iter(lines)
            return [Segment(placed[index] if index in placed else next(rest)) for index in range(size)]

        asked, ends = [thread[0] for thread in threads], [thread[-1] for thread in threads]
        boundary = [Segment(material.one(self._head()))], [Segment(material.one(self._tail(asked)))]
        answers = [
            listed(material, [f'"{value}"' for value in chosen], "is" if len(ends) == 1 else "are")
            for chosen in (ends, *wrong)
        ]
        return question(material, length, boundary, answers, context, depth)

    def _head(self) -> str:
        threads = "" if self.hops == 1 else " A value may be a key of the object again."
        return f"This is a JSON object of keys and values.{threads}\n{{\n"

    def _tail(self, asked: list[str]) -> str:
        keys = ", ".join(f'"{key}"' for key in asked)
        if self.hops == 1:
            return f"}}\nWhat is the value of the key {keys}? Its value is"
        several = len(asked) > 1
        start, last = ("each of the keys", "s are") if several else ("the key", " is")
        return (
            f"}}\nStart at {start} {keys}. While a value is itself a key, go on to the value of that key. The last "
            f"value{last}"
        )
