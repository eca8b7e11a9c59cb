"""Sequences that come twice in a row, and sequences after a prefix of their own or of another document."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from .draws import Draws
from .material import Material
from .sample import BASELINE, FIRST_REFERENCE, Sample, Segment, join, too_short


@dataclass(frozen=True)
class Copy:
    """A sequence that comes twice in a row, which shows whether a model can use its context at all.

    The loss of the first copy is the baseline of the second. The first token of each copy is not scored.
    """

    kind: Literal["documents", "random"]
    """Text, or random tokens of the vocabulary."""
    any_order: bool = False

    def make(self, material: Material, length: int, number: int, distractors: int, draws: Draws) -> Sample:
        """Return a sample, as `Task.make` says, without distractors."""
        half = length // 2
        if half < 2:
            raise too_short(length, "a copy takes at least 4 tokens")
        text = (
            material.random_tokens(half, draws) if self.kind == "random" else material.haystack(self.kind, half, draws)
        )
        odd = Segment(np.full(length - 2 * half, material.boundary_id))  # fills a row of odd length
        prompt = [odd, Segment(text[:1]), Segment(text[1:], BASELINE), Segment(text[:1])]
        return join(length, material.boundary_id, prompt, [[Segment(text[1:], FIRST_REFERENCE)]], None)


@dataclass(frozen=True)
class RelatedPrefix:
    """The end of a held-out sequence after its own prefix, after another sequence's as the distractor, and alone."""

    any_order: bool = False

    def make(self, material: Material, length: int, number: int, distractors: int, draws: Draws) -> Sample:
        """Return a sample, as `Task.make` says. Raises ValueError without held-out documents."""
        if material.documents is None:
            raise ValueError(
                "evaluate.tasks = prefix: there are no held-out documents; name prepared data, or leave out the prefix"
            )
        row, other, cut = material.documents.continued(length, draws)  # [length + 1] each
        rows = np.stack([row, np.concatenate([other[:cut], row[cut:]])])  # [2, length + 1], alike from the cut on
        parts = np.zeros((2, length), dtype=np.uint8)
        parts[:, cut:] = FIRST_REFERENCE  # all targets after the cut but the first, equal in both rows
        return Sample(rows, parts, alone=cut)
