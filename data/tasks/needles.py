"""Needles in a haystack, by RULER's rules (arXiv 2404.06654): single, multi-key, multi-value and multi-query."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from .draws import Draws, different
from .material import Material
from .sample import Sample, Segment, Tokens
from .task import depths, fitting, hide, listed, question
from .words import two_words

Kind = Literal["word", "number", "uuid"]


def _drawn(kind: Kind, draws: Draws) -> str:
    """Return a random word, number of 7 digits, or UUID."""
    return {"word": lambda: two_words(draws), "number": lambda: draws.digits(7), "uuid": draws.uuid}[kind]()


@dataclass(frozen=True)
class Needles:
    """Statements "The secret number of KEY is VALUE" in a haystack, and a question for the values of some keys."""

    haystack: Literal["noise", "documents", "needles"]
    """"needles": the haystack is nothing but statements about other keys."""
    key: Kind = "word"
    value: Kind = "number"
    keys: int = 1
    """Number of keys with statements; of a haystack of needles, those beside the haystack's."""
    values: int = 1
    """Number of statements about each key."""
    queries: int = 1
    """Number of keys that are asked for."""

    @property
    def any_order(self) -> bool:
        """Whether the answer has several values."""
        return self.values * self.queries > 1

    def make(self, material: Material, length: int, number: int, distractors: int, draws: Draws) -> Sample:
        """Return a sample, as `Task.make` says; its depth is that of the statement, if only one is asked for."""
        named = {"word": "word", "number": "number", "uuid": "code"}[self.value]
        keys = different(lambda: _drawn(self.key, draws), self.keys)
        num_values = (self.keys + distractors * self.queries) * self.values
        every = different(lambda: _drawn(self.value, draws), num_values)  # of the text, then of wrong answers
        by_key = [every[index * self.values : (index + 1) * self.values] for index in range(self.keys)]  # [key][value]
        asked = draws.distinct(self.keys, self.queries)  # keys, in the order of the question

        # The statement that the sample's number gives a depth is the first: of the key that is asked for first.
        order = [*asked, *(index for index in range(self.keys) if index not in asked)]
        at = depths(number, self.keys * self.values, draws)  # [statements], as `order` has them
        if self.values > 1:
            at[: self.values] = sorted(at[: self.values])  # values of one key are listed as they appear
        statements = [(keys[index], value) for index in order for value in by_key[index]]
        newline = "" if self.haystack == "needles" else "\n"  # between needles there is one already
        needles = material.encode([newline + self._statement(named, key, value) for key, value in statements], ".")

        query = " and ".join(", ".join(keys[index] for index in part) for part in (asked[:-1], asked[-1:]) if part)
        several, verb = ("s", "are") if self.any_order else ("", "is")
        head = (
            f"The text below tells the secret {named}{several} of some things. Remember what it tells: a question "
            "about it follows.\n"
        )
        tail = (
            f"\nWhat {verb} the secret {named}{several} of {query}? As the text tells, the secret {named}{several} of "
            f"{query} {verb}"
        )
        right = [value for index in asked for value in by_key[index]]
        # Wrong values are values of the text, where it has enough others.
        wrong = [value for index in order[self.queries :] for value in by_key[index]] + every[self.keys * self.values :]
        answers = [right, *(wrong[first * len(right) : (first + 1) * len(right)] for first in range(distractors))]

        def context(tokens: int) -> list[Segment]:
            left = tokens - sum(map(len, needles))  # below 0 the row is too short, which `filler` raises
            if self.haystack != "needles":
                found = material.haystack(self.haystack, max(left, 0), draws)
                cuts = material.cuts(found)
                # [needles]. The last cut is the end, so every depth has a cut at or behind it.
                behind = np.searchsorted(cuts, [depth * len(found) for depth in at])
                return hide(found, needles, cuts[behind].tolist())
            lines = fitting(material, left, lambda: self._other(named, keys, every, draws))
            return _among(lines, needles, at)

        ends = [Segment(material.one(head))], [Segment(material.one(tail, "."))]
        depth = None if self.any_order else at[0]
        return question(material, length, ends, [listed(material, answer, verb) for answer in answers], context, depth)

    def _statement(self, named: str, key: str, value: str) -> str:
        return f"The secret {named} of {key} is {value}.\n"

    def _other(self, named: str, keys: list[str], values: list[str], draws: Draws) -> str:
        """Return a statement about another key, with another value."""
        while (key := _drawn(self.key, draws)) in keys:
            pass
        while (value := _drawn(self.value, draws)) in values:
            pass
        return self._statement(named, key, value)


def _among(lines: list[Tokens], needles: list[Tokens], at: list[float]) -> list[Segment]:
    """Return the lines with each needle before the line at its depth."""
    found = list(map(Segment, lines))
    # From the last to the first, so that an insertion does not move the positions that are left.
    for depth, needle in sorted(zip(at, needles, strict=True), key=lambda pair: -pair[0]):
        found.insert(round(depth * len(lines)), Segment(needle))
    return found
