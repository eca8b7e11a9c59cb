"""Words to be counted, by RULER's rules: common words, and frequent words of a zeta distribution."""

import math
import string
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .draws import Draws, different
from .material import Material
from .sample import Sample, Segment, Tokens, too_short
from .task import listed, question
from .words import made_up_words

SHORT_TOKENS = 4096
"""Below this length common words occur 6 times and all others once, instead of 30 and 3 times."""


@dataclass(frozen=True)
class CommonWords:
    """A numbered list in which ten words occur more often than all others."""

    num_common: int = 10
    any_order: bool = True

    def make(self, material: Material, length: int, number: int, distractors: int, draws: Draws) -> Sample:
        """Return a sample, as `Task.make` says. A solved list comes before it.

        The answer has the words in the order in which they first appear, which the solved list shows.
        """
        short = length < SHORT_TOKENS
        often, seldom = (6, 1) if short else (30, 3)
        num_solved, solved_often, solved_seldom = (20, 3, 1) if short else (40, 10, 3)
        # No word has less than a token, so no more words than tokens fit.
        words = made_up_words(draws, num_solved + self.num_common + length // seldom)
        # In three parts: the words of the solved list, the common ones, and all others.
        solved, common, others = words[:num_solved], words[num_solved:][: self.num_common], words[num_solved:]
        others = others[self.num_common :]
        wrong = [others[index * self.num_common :][: self.num_common] for index in range(distractors)]

        def context(tokens: int) -> list[Segment]:
            size = self._fit(material, tokens, common, others, often, seldom)
            # Every word of a wrong answer is in the list, once or a few times.
            if size < max(1, distractors * self.num_common):
                raise too_short(length, f"no room for {self.num_common} common words and others beside them")
            return [Segment(_numbered(material, self._mixed([*common, *others[:size]], often, seldom, draws)))]

        head = "Some words of this numbered list stand in it more often than the others. Remember them.\n"
        tail = f"\nThe {self.num_common} words that stand in the list most often are"
        order = self._mixed(solved, solved_often, solved_seldom, draws)
        counted = "".join(f" {index + 1}. {word}" for index, word in enumerate(order))
        example = f"{head}{counted}{tail} {', '.join(solved[: self.num_common])}\n\n"
        ends = [Segment(material.one(example)), Segment(material.one(head))], [Segment(material.one(tail, "a"))]
        answers = [listed(material, chosen, "are") for chosen in (common, *wrong)]
        return question(material, length, ends, answers, context)

    def _mixed(self, words: Sequence[str], often: int, seldom: int, draws: Draws) -> list[str]:
        """Return the common words `often` times and all others `seldom` times, mixed; common ones appear in order."""
        order = draws.shuffled([*words[: self.num_common]] * often + [*words[self.num_common :]] * seldom)
        common = set(words[: self.num_common])
        appear = dict.fromkeys(word for word in order if word in common)
        renamed = dict(zip(appear, words, strict=False))  # the k-th to appear becomes words[k]
        return [renamed.get(word, word) for word in order]

    def _fit(
        self, material: Material, tokens: int, common: list[str], others: list[str], often: int, seldom: int
    ) -> int:
        """Return the number of other words with which the list has at most this many tokens; -1: not without any."""
        sizes = [len(ids) for ids in material.encode([f" {word}" for word in [*common, *others]], ".")]
        words = often * sum(sizes[: len(common)]) + seldom * np.cumsum([0, *sizes[len(common) :]])  # [others + 1]
        totals = often * len(common) + seldom * np.arange(len(words))  # [others + 1]: entries of the list
        numbers = np.cumsum([0, *map(len, _numbers(material, int(totals[-1])))])  # [entries + 1], of the first n
        # Tokens rise with the number of others, so bisection finds the most that fit.
        return int(np.searchsorted(words + numbers[totals], tokens, side="right")) - 1


def _numbers(material: Material, count: int) -> list[Tokens]:
    return material.encode([f" {index + 1}." for index in range(count)], "a")


def _numbered(material: Material, words: Sequence[str]) -> Tokens:
    """Return the tokens of a numbered list of words."""
    distinct = list(dict.fromkeys(words))
    ids = dict(zip(distinct, material.encode([f" {word}" for word in distinct], "."), strict=True))
    pairs = zip(_numbers(material, len(words)), words, strict=True)
    return np.concatenate([part for number, word in pairs for part in (number, ids[word])])


@dataclass(frozen=True)
class FrequentWords:
    """A text of coded words whose frequencies fall with the square of their rank; the first three are asked for."""

    num_asked: int = 3
    any_order: bool = True

    def make(self, material: Material, length: int, number: int, distractors: int, draws: Draws) -> Sample:
        """Return a sample, as `Task.make` says. The most frequent word is "...", which the question leaves out."""
        num_words = max(length // 50, 1 + self.num_asked * (1 + distractors))
        words = ["...", *different(lambda: draws.letters(string.ascii_lowercase, 6), num_words)]
        # [1 + distractors][num_asked]: the right words, then wrong ones of lower frequency; words[0] is the dots.
        asked = [words[1 + index * self.num_asked :][: self.num_asked] for index in range(1 + distractors)]

        def context(tokens: int) -> list[Segment]:
            ids = material.encode([f" {word}" for word in words], "a")
            sizes = np.array([len(one) for one in ids])  # [words], in tokens
            # The first `total` with which the words take more than `tokens`: one less still fits.
            total = bisect_right(range(tokens + 1), tokens, key=lambda total: int(_counts(total, len(words)) @ sizes))
            counts = _counts(total - 1, len(words))
            # The dots, the words asked for and the next one differ, so the answer and its order are the only ones.
            if (np.diff(counts[: self.num_asked + 2]) >= 0).any():
                raise too_short(length, f"no room for {self.num_asked} words that differ in frequency")
            order = draws.shuffled(np.repeat(np.arange(len(words)), counts).tolist())  # index of each word of the text
            return [Segment(ids[index]) for index in order]

        head = "This text is made of coded words. Count how often each of them stands in it.\n"
        tail = (
            f"\nThe dots aside, which {self.num_asked} words stand in the text most often? The {self.num_asked} words "
            "that stand in it most often are"
        )
        ends = [Segment(material.one(head))], [Segment(material.one(tail, "a"))]
        return question(material, length, ends, [listed(material, chosen, "are") for chosen in asked], context)


def _counts(total: int, ranks: int) -> NDArray[np.int64]:
    """Return how often the word of each rank occurs in `total` words of a zeta distribution with exponent 2.

    int64 `[ranks]`, rounded down.
    """
    return (total * 6 / math.pi**2 / np.arange(1, ranks + 1) ** 2).astype(np.int64)  # 6 / pi^2 = 1 / zeta(2)
