"""Order of knotted chunks: the backtrace of Untie the Knots (arXiv 2409.04774)."""

import string
from dataclasses import dataclass

import numpy as np

from .draws import Draws, different
from .material import Material
from .sample import Sample, Segment, Tokens, references, too_short
from .task import question


@dataclass(frozen=True)
class Backtrace:
    """Texts cut into labelled chunks that are mixed, and a question for the labels of one text, in their order.

    The chunks of a text keep their order; the text that is asked for is the one whose last chunk ends the context.
    Marks are the special tokens of `knots`, or words where the tokenizer has none of them.
    """

    texts: int = 4
    chunks: int = 3
    """Number of chunks of each text."""
    any_order: bool = False

    def make(self, material: Material, length: int, number: int, distractors: int, draws: Draws) -> Sample:
        """Return a sample, as `Task.make` says. Distractors are the labels of other texts."""
        count = self.texts * self.chunks
        names = different(lambda: draws.letters(string.ascii_letters + string.digits, 6), count)
        labels = np.reshape(np.arange(count), (self.texts, self.chunks))  # [text, chunk]: index of its name
        ids = material.encode(names, "[")
        # Text of each chunk of the context: each text comes once per chunk, and its chunks keep their order.
        order = draws.shuffled([text for text in range(self.texts) for _ in range(self.chunks)])
        asked = order[-1]
        wrong = [text for text in range(self.texts) if text != asked]
        if distractors > len(wrong):
            raise ValueError(
                f"distractors = {distractors}: the backtrace has {len(wrong)} other texts; ask for at most as many, or "
                "make more texts"
            )
        begin, end = material.mark("<|label|>", "\n["), material.mark("<|/label|>", "] ")
        then = material.mark("<|then|>", ", ")

        def traced(text: int) -> list[Segment]:
            chosen = [ids[label] for label in labels[text]]
            return references([chosen[0], *(np.concatenate([then, label]) for label in chosen[1:])])

        def context(tokens: int) -> list[Segment]:
            # [side][chunk][tokens]
            marks = [[self._marks(material, chunk, side) for chunk in range(self.chunks)] for side in (0, 1)]
            # Tokens of the context that are no text: labels and their marks, heads and tails.
            fixed = count * (len(begin) + len(end)) + sum(map(len, ids))
            fixed += self.texts * sum(len(mark) for side in marks for mark in side)
            sizes = np.full(self.texts, (tokens - fixed) // self.texts)
            if sizes[0] < 2 * self.chunks:
                raise too_short(length, f"no room for {count} chunks")
            cut = [self._cut(material.haystack("documents", size, draws), draws) for size in sizes.tolist()]
            # done[text]: number of the chunks of a text that are in `found`.
            done, found = [0] * self.texts, []
            for text in order:
                chunk, done[text] = done[text], done[text] + 1
                around = begin, ids[labels[text, chunk]], end, marks[0][chunk], cut[text][chunk], marks[1][chunk]
                found += [Segment(part) for part in around]
            return found

        ends = [], [Segment(material.mark("<|trace|>", "\nThe parts of the last text, in order: "))]
        return question(material, length, ends, [traced(text) for text in (asked, *wrong[:distractors])], context)

    def _cut(self, text: Tokens, draws: Draws) -> list[Tokens]:
        # Cuts are in 1, ..., n - 1 and differ, so no chunk is empty.
        cuts = sorted(1 + cut for cut in draws.distinct(len(text) - 1, self.chunks - 1))
        return np.split(text, cuts)

    def _marks(self, material: Material, chunk: int, side: int) -> Tokens:
        """Return the head (side 0) or tail (side 1) of a knot at a chunk; none at the ends of a text."""
        if chunk == (0 if side == 0 else self.chunks - 1):
            return np.empty(0, dtype=np.int64)
        if side == 0:
            return material.mark(f"<|head_{chunk + 1}|>", f"({chunk + 1}) ")
        return material.mark(f"<|tail_{chunk + 1}|>", f" ({chunk + 2})")
