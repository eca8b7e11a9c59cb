"""One sample of a task: rows of tokens, and the targets of each row that are scored."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]

NOT_SCORED = 0
"""Part of a target that no score counts."""
BASELINE = 1
"""Part of the targets whose mean loss is compared with the answer's."""
FIRST_REFERENCE = 2
"""Part of the targets of the first reference of the answer; the next references follow."""
MAX_REFERENCES = 100


class TooShortError(ValueError):
    """A task does not fit into the length that was asked for."""


def too_short(length: int, why: str) -> TooShortError:
    """Return the error of a length that does not hold a task."""
    return TooShortError(f"length = {length}: {why}; take a longer bucket, or give a greater length")


class Segment(NamedTuple):
    """Adjacent tokens of a row that belong to one part."""

    tokens: Tokens
    part: int = NOT_SCORED


@dataclass(frozen=True, eq=False)
class Sample:
    """A question with its answer, and the same question with wrong answers."""

    rows: Tokens
    """Tokens `[candidates, length + 1]`; inputs are `[:, :-1]`, targets `[:, 1:]`. The first row has the answer, all
    others are distractors: the same context with another answer, or the same answer with another context."""

    parts: NDArray[np.uint8]
    """Part of each target, `[candidates, length]`: NOT_SCORED, BASELINE, or a reference from FIRST_REFERENCE on."""

    depth: float | None = None
    """Position of the information that the answer needs, from 0 (begin of the context) to 1 (its end); None where it
    has no single position."""

    accepted: Tokens = field(default_factory=lambda: np.empty((0, 2), dtype=np.int64))
    """Tokens that are as right as the target, int64 `[n, 2]` = (target's position, token); first row only."""

    alone: int | None = None
    """Position at which visibility starts anew in one more copy of the first row, whose loss is then the baseline."""

    @property
    def length(self) -> int:
        """Number of inputs, and of targets, of each row."""
        return self.parts.shape[1]


def references(texts: Sequence[Tokens]) -> list[Segment]:
    """Return an answer of several references, one after the other, all of them scored.

    Raises ValueError for more than MAX_REFERENCES.
    """
    if len(texts) > MAX_REFERENCES:
        raise ValueError(
            f"texts: an answer has at most {MAX_REFERENCES} references, and these are {len(texts)}; ask for fewer in a "
            "question"
        )
    return [Segment(tokens, FIRST_REFERENCE + number) for number, tokens in enumerate(texts)]


def room(length: int, prompt: Sequence[Segment], answers: Sequence[Sequence[Segment]]) -> int:
    """Return the number of tokens left for the context in a row of `length` targets.

    The row begins with a boundary token; `prompt` is all of the prompt but the context, and the longest answer must
    fit. Raises TooShortError, which names the number of tokens that are needed, if nothing is left.
    """
    longest = max(sum(len(segment.tokens) for segment in answer) for answer in answers)
    fixed = 1 + sum(len(segment.tokens) for segment in prompt) + longest
    if (left := length + 1 - fixed) < 0:
        raise too_short(length, f"question and answer alone take {fixed - 1} tokens")
    return left


def join(
    length: int, boundary_id: int, prompt: Sequence[Segment], answers: Sequence[Sequence[Segment]], depth: float | None
) -> Sample:
    """Return the sample whose rows are a boundary token, the prompt and one of the answers each.

    Prompt and the longest answer fill the row exactly; shorter answers are followed by boundary tokens, which no scored
    target follows.
    """
    rows = np.full((len(answers), length + 1), boundary_id, dtype=np.int64)  # [answers, length + 1]
    parts = np.full((len(answers), length + 1), NOT_SCORED, dtype=np.uint8)
    stops = []
    for row, part, answer in zip(rows, parts, answers, strict=True):
        at = 1  # after the boundary token
        for segment in (*prompt, *answer):
            stop = at + len(segment.tokens)
            row[at:stop], part[at:stop] = segment.tokens, segment.part
            at = stop
        stops.append(at)
    assert max(stops) == length + 1, f"rows end at {stops} of {length + 1}"
    return Sample(rows, parts[:, 1:], depth)  # a target has the part of its own token
