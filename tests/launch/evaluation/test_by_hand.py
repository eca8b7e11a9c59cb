"""The arithmetic of scores on a few numbers, worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from longring.data.format.manifest import Manifest
from longring.data.format.reader import SequenceReader
from longring.launch.evaluation.context import HeldOutRows, gain_of_context
from longring.launch.evaluation.score import Row, Scorer, _right
from longring.launch.evaluation.tasks import by_depth, scores_of

NONE = (0.0, 0, 0)
"""Loss, right tokens and tokens of a part that a row lacks."""


def test_scores_of_two_samples():
    """Parts: not scored, baseline, two references. The first row of a sample is the answer, the others distractors."""
    first = [
        [(9.0, 0, 9), (8.0, 0, 4), (1.0, 2, 2), (2.0, 1, 2)],
        [(9.0, 0, 9), NONE, (4.0, 2, 2), (4.0, 2, 2)],
        [(9.0, 0, 9), NONE, (1.0, 2, 2), (1.0, 2, 2)],
    ]
    second = [
        [(9.0, 0, 9), (6.0, 0, 2), (1.0, 1, 1), (1.0, 3, 3)],
        [(9.0, 0, 9), NONE, (2.0, 0, 1), (2.0, 0, 3)],
        [(9.0, 0, 9), NONE, (3.0, 0, 1), (5.0, 0, 3)],
    ]
    found = {
        name: None if value is None else value.tolist() for name, value in scores_of(np.array([first, second])).items()
    }
    assert found == {
        "exact": [0, 1],  # one of four tokens of the first answer is wrong
        "references": [0.5, 1],
        "tokens": [0.75, 1],
        "loss": [3 / 4, 2 / 4],
        "margin": [((8 - 3) / 4 + (2 - 3) / 4) / 2, ((4 - 2) / 4 + (8 - 2) / 4) / 2],
        "preferred": [0, 1],  # the second distractor of the first sample is likelier than the answer
        "gain": [8 / 4 - 3 / 4, 6 / 2 - 2 / 4],
    }
    alone = scores_of(np.array([[[NONE, NONE, (1.0, 2, 2)]]]))
    assert alone["margin"] is alone["preferred"] is alone["gain"] is None


def test_scores_by_depth():
    depths, exact = [0.0, 0.12, 0.13, 0.99, 1.0], np.array([1.0, 0.0, 1.0, 0.0, 0.0])
    found = by_depth(depths, {"exact": exact, "tokens": (1 + exact) / 2, "loss": np.array([1.0, 3.0, 5.0, 7.0, 8.0])})
    assert [tuple(entry.values()) for entry in found] == [
        (0.0, 0.125, 2, 0.5, 0.75, 2.0),
        (0.125, 0.25, 1, 1.0, 1.0, 5.0),
        (0.875, 1.0, 2, 0.0, 0.5, 7.5),
    ]


def test_a_token_is_right_if_it_or_one_accepted_for_it_is_the_most_likely():
    """A rank of a ring holds positions 1, 5 and 2 of 8, of two rows."""
    accepted = np.array([[1, 40], [1, 41], [2, 42], [5, 40], [6, 43], [7, 44]])
    tokens, parts = np.zeros(9, dtype=np.int64), np.zeros(8, dtype=np.uint8)
    rows = [Row(tokens, parts, accepted=accepted), Row(tokens, parts)]
    targets = torch.tensor([[10, 50, 20], [10, 50, 20]])
    for greedy, right in (
        ([10, 50, 20], [True, True, True]),
        ([41, 41, 41], [True, False, False]),
        ([40, 40, 40], [True, True, False]),
        ([42, 42, 42], [False, False, True]),
        ([43, 44, 43], [False, False, False]),
    ):
        found = _right(rows, targets, torch.tensor([greedy, greedy]), torch.tensor([1, 5, 2]), 8)
        assert found.tolist() == [right, [best == target for best, target in zip(greedy, (10, 50, 20), strict=True)]]


class Sums:
    """A scorer that is given the loss of each row's last eighth."""

    def __init__(self, losses: list[float]) -> None:
        self.layout = SimpleNamespace(length=16)
        self.losses, self.starts = losses, []

    def sums(self, num_rows: int, num_parts: int, row: Callable[[int], Row]) -> np.ndarray:
        rows = [row(number) for number in range(num_rows)]
        self.starts = [one.starts for one in rows]
        assert num_parts == 2 and {one.parts.sum() for one in rows} == {2}
        return np.array([[NONE, (2 * loss, 0, 2)] for loss in self.losses])


@pytest.mark.parametrize("apart", [True, False])
def test_gain_of_context_of_three_sequences(apart):
    """Their gains are 1, 2 and 6 nats: 3 in the mean, whose variance is 7 over 3 sequences."""
    manifest = cast(Manifest, SimpleNamespace(has_boundaries=apart))
    reader: Any = SimpleNamespace(
        read=lambda numbers: np.zeros((len(numbers), 17), dtype=np.uint32), document_starts=lambda _: [[0, 3, 14]]
    )
    rows = HeldOutRows(manifest, cast(SequenceReader, reader), np.arange(3))
    scorer = Sums([10 - gain * visible / 7 for gain in (1, 2, 6) for visible in range(8)])
    found = gain_of_context(cast(Scorer, scorer), rows)
    assert found["losses"] == pytest.approx([10 - 3 * visible / 7 for visible in range(8)])
    assert found["gain"] == pytest.approx(3) and found["gain_error"] == pytest.approx(math.sqrt(7 / 3))
    documents = {0, 3, 14} if apart else {0}  # nothing before one is visible behind it
    assert scorer.starts == [tuple(sorted({*documents, 14 - 2 * visible})) for visible in range(8)] * 3
