"""Scores of tasks: likelihood of the answer against distractors, and exact match of greedy tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...data.tasks.catalog import TASKS
from ...data.tasks.draws import Draws
from ...data.tasks.material import Material
from ...data.tasks.sample import BASELINE, FIRST_REFERENCE, Sample
from ...data.tasks.task import first_depth
from .score import Row, Scorer

DEPTH_BINS = 8
"""Number of equal ranges of depth in results."""


def score_task(
    scorer: Scorer, name: str, material: Material, *, count: int, distractors: int, seed: int
) -> dict[str, Any]:
    """Return the scores of `count` samples of a task, of the length of the scorer's layout. Collective.

    Raises TooShortError if the length does not hold the task, and ValueError if the material does not suit it.
    """
    task, length = TASKS[name], scorer.layout.length

    @lru_cache(maxsize=2)  # the rows of a sample follow each other
    def made(number: int) -> Sample:
        return task.make(material, length, number, distractors, Draws(seed, name, length, number))

    first = made(0)  # every rank makes it, so all raise its error alike
    candidates = len(first.rows)
    num_rows = candidates + (first.alone is not None)  # of a sample

    def row(number: int) -> Row:
        sample, candidate = divmod(number, num_rows)
        found = made(sample)
        if candidate == candidates:
            # The answer without what stands before `alone`; starts ascend, so 0 is not repeated.
            return Row(found.rows[0], found.parts[0], (0, *([found.alone] if found.alone else [])))
        one = Row(found.rows[candidate], found.parts[candidate])
        return one._replace(accepted=found.accepted) if candidate == 0 else one

    sums = scorer.sums(count * num_rows, int(first.parts.max()) + 1, row)
    sums = sums.reshape(count, num_rows, *sums.shape[1:])  # [samples, rows, parts, 3]
    if first.alone is not None:
        sums[:, 0, BASELINE] = sums[:, candidates, FIRST_REFERENCE:].sum(1)  # baseline: the answer of the last row
    scores = scores_of(sums[:, :candidates])
    depths = [first_depth(number) for number in range(count)] if first.depth is not None else []
    return {
        "task": name,
        "length": length,
        "cp": scorer.layout.context_parallel,
        "samples": count,
        "lower_bound": task.any_order,
        **{key: None if values is None else float(values.mean()) for key, values in scores.items()},
        "by_depth": by_depth(depths, scores),
    }


def scores_of(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64] | None]:
    """Return the scores of each sample, `[samples]`, from sums `[samples, candidates, parts, 3]` of `Scorer.sums`.

    - exact: 1 if every token of the answer is the most likely one
    - references: share of the answer's references of which this is true
    - tokens: share of the answer's tokens of which this is true
    - loss: mean loss of the answer's tokens, in nats
    - margin: by how much the mean loss of the tokens of a distractor is higher, mean over distractors
    - preferred: 1 if that of every distractor is higher
    - gain: by how much the mean loss of the baseline is higher

    A score is None where nothing defines it.
    """
    answers = sums[:, :, FIRST_REFERENCE:]  # [samples, candidates, references, 3]
    loss, right, tokens = np.moveaxis(answers[:, 0], -1, 0)  # [samples, references] each
    means = answers[..., 0].sum(2) / answers[..., 2].sum(2)  # [samples, candidates]
    baseline = sums[:, 0, BASELINE]
    has_distractors, has_baseline = means.shape[1] > 1, bool((baseline[:, 2] > 0).all())
    margins = means[:, 1:] - means[:, :1]  # [samples, distractors]
    return {
        "exact": (right == tokens).all(1).astype(np.float64),
        "references": (right == tokens).mean(1),
        "tokens": right.sum(1) / tokens.sum(1),
        "loss": loss.sum(1) / tokens.sum(1),
        "margin": margins.mean(1) if has_distractors else None,
        "preferred": (margins > 0).all(1).astype(np.float64) if has_distractors else None,
        "gain": baseline[:, 0] / baseline[:, 2] - means[:, 0] if has_baseline else None,
    }


def by_depth(depths: Sequence[float], scores: dict[str, NDArray[np.float64] | None]) -> list[dict[str, Any]]:
    """Return exact match, right tokens and loss by range of depth, of ranges with samples; scores are `[samples]`."""
    # A depth of 1 belongs to the last range.
    bins = np.minimum((np.array(depths) * DEPTH_BINS).astype(np.int64), DEPTH_BINS - 1)
    exact, tokens, loss = scores["exact"], scores["tokens"], scores["loss"]
    assert exact is not None and tokens is not None and loss is not None
    return [
        {
            "from": number / DEPTH_BINS,
            "to": (number + 1) / DEPTH_BINS,
            "samples": int((bins == number).sum()),
            "exact": float(exact[bins == number].mean()),
            "tokens": float(tokens[bins == number].mean()),
            "loss": float(loss[bins == number].mean()),
        }
        for number in np.unique(bins).tolist()
    ]
