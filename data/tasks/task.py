"""The interface of a task, and what several tasks share."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from .draws import Draws
from .material import Material
from .sample import Sample, Segment, Tokens, join, references, room

DEPTHS = np.linspace(0, 1, 40).tolist()
"""Depths at which needles are hidden."""


class Task(Protocol):
    """A kind of question. Samples are a pure function of the task and of the arguments of `make`."""

    @property
    def any_order(self) -> bool:
        """Whether other orders of the references are right too; teacher forcing in one order is then a lower bound."""
        ...

    def make(self, material: Material, length: int, number: int, distractors: int, draws: Draws) -> Sample:
        """Return sample `number` with `length` targets and this many distractors.

        Raises TooShortError if the length does not hold the task, and ValueError if the material does not suit it.
        """
        ...


def first_depth(number: int) -> float:
    """Return the depth of sample `number` of a task whose samples have one: any 40 in succession have every depth."""
    # 17 has no factor of 40, so 40 in succession differ, and neighbours lie far apart.
    return DEPTHS[17 * number % len(DEPTHS)]


def depths(number: int, count: int, draws: Draws) -> list[float]:
    """Return `count` different depths, the first of which is `first_depth(number)`."""
    first = first_depth(number)
    others = [depth for index in draws.distinct(len(DEPTHS), count) if (depth := DEPTHS[index]) != first]
    return [first, *others[: count - 1]]


def hide(haystack: Tokens, needles: Sequence[Tokens], positions: Sequence[int]) -> list[Segment]:
    """Return the haystack with each needle before the token at its position; needles of one position keep their order.

    The position len(haystack) is its end.
    """
    found, done = [], 0  # invariant: `found` holds haystack[:done]
    for position, needle in sorted(zip(positions, needles, strict=True), key=lambda pair: pair[0]):
        found += [Segment(haystack[done:position]), Segment(needle)]
        done = position
    return [*found, Segment(haystack[done:])]


def fitting(material: Material, tokens: int, unit: Callable[[], str]) -> list[Tokens]:
    """Return as many units of text as fit into a number of tokens, each drawn by `unit` and encoded as a line.

    There are none for a negative number, which the caller finds to be too small.
    """
    found: list[Tokens] = []
    # Every unit has a token at least, so one of them no longer fits.
    while tokens >= 0:
        for ids in material.encode([unit() for _ in range(1 + tokens // 16)]):
            if len(ids) > tokens:
                return found
            tokens -= len(ids)
            found.append(ids)
    return found


def question(
    material: Material,
    length: int,
    ends: tuple[Sequence[Segment], Sequence[Segment]],
    answers: Sequence[Sequence[Segment]],
    context: Callable[[int], Sequence[Segment]],
    depth: float | None = None,
) -> Sample:
    """Return the sample of a context between the two `ends` of its prompt, and the answers.

    `context` gets the number of tokens that are left for it and returns at most as many; noise before the prompt fills
    what remains.
    """
    head, tail = ends
    inside = context(room(length, [*head, *tail], answers))
    prompt = [*head, *inside, *tail]
    return join(length, material.boundary_id, [filler(material, length, prompt, answers), *prompt], answers, depth)


def filler(material: Material, length: int, prompt: Sequence[Segment], answers: Sequence[Sequence[Segment]]) -> Segment:
    """Return noise that fills a row, to stand before its prompt: less than one unit of its context."""
    return Segment(material.haystack("noise", room(length, prompt, answers), Draws("filler")))


def listed(material: Material, texts: Sequence[str], before: str, separator: str = ",") -> list[Segment]:
    """Return an answer of several references, each after a space, and a separator before all but the first."""
    following = [f"{separator if index else ''} {text}" for index, text in enumerate(texts)]
    return references([*material.encode(following[:1], before), *material.encode(following[1:], "a")])
