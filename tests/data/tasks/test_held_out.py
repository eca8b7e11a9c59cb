"""Held-out documents as haystacks: all of them, without boundary tokens, and cut where a document begins."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from longring.data.format.manifest import Manifest
from longring.data.tasks.draws import Draws
from longring.data.tasks.held_out import HeldOut

BOUNDARY = 0


class Bucket:
    """Sequences of one length whose documents begin at `starts`; each token names its bucket and sequence."""

    def __init__(self, length: int, sequences: int, starts: Sequence[int] = (0,)) -> None:
        self.length, self.sequences, self.starts = length, sequences, starts

    def token(self, number: int) -> int:
        return 1000 * self.length + number

    def read(self, numbers: Sequence[int]) -> np.ndarray:
        rows = np.array([[self.token(number)] * (self.length + 1) for number in numbers], dtype=np.uint32)
        rows[:, list(self.starts)] = BOUNDARY
        return rows

    def document_starts(self, numbers: Sequence[int]) -> list[list[int]]:
        return [[*self.starts] for _ in numbers]


def held_out(*buckets: Bucket) -> HeldOut:
    manifest: Any = SimpleNamespace(
        buckets=lambda _: buckets,
        reader=lambda bucket: bucket,
        boundary_id=BOUNDARY,
        store=SimpleNamespace(name="data"),
    )
    return HeldOut(cast(Manifest, manifest))


def test_a_haystack_has_every_document_before_one_again_and_no_boundary():
    short, long = Bucket(8, 3, (0, 5)), Bucket(32, 2)
    every = sum(bucket.sequences * (bucket.length + 1 - len(bucket.starts)) for bucket in (short, long))
    text = held_out(short, long).text(every + 20, Draws("a"))
    assert text.shape == (every + 20,) and text.dtype == np.int64
    assert BOUNDARY not in text
    once, again = text[:every], text[every:]
    for bucket in (short, long):
        for number in range(bucket.sequences):
            assert (once == bucket.token(number)).sum() == bucket.length + 1 - len(bucket.starts)
    assert set((once[:64] // 1000).tolist()) == {32}, "longest first"
    assert len(set(again.tolist())) == 1 and again[0] // 1000 == 32
    assert len(held_out(short, long).text(0, Draws("a"))) == 0
    assert any((held_out(short, long).text(every, Draws(seed)) != once).any() for seed in range(9)), "in random order"


def test_documents_of_boundaries_alone_are_told():
    empty = held_out(Bucket(8, 3, range(9)), Bucket(32, 2, range(33)))
    assert len(empty.text(0, Draws("a"))) == 0
    told = "data: the held-out documents have no tokens but boundaries; prepare the data with a larger data.held_out_"
    with pytest.raises(ValueError, match=told):
        empty.text(5, Draws("a"))
    assert set(held_out(Bucket(8, 3, range(9)), Bucket(32, 2)).text(70, Draws("a")) // 1000) == {32}


@pytest.mark.parametrize(
    ("starts", "cut"),
    [((0,), 16), ((0, 15), 16), ((0, 16), 16), ((0, 5, 20, 25), 20), ((0, 30), 30), ((0, 31), 16)],
    ids=str,
)
def test_a_prefix_ends_where_a_document_begins(starts, cut):
    """The first begin from the middle on that leaves a target; without one, the middle."""
    row, other, found = held_out(Bucket(8, 9), Bucket(32, 2, starts)).continued(32, Draws("a"))
    assert found == cut
    assert {row.max(), other.max()} == {32_000, 32_001} and row.shape == other.shape == (33,)


def test_a_bucket_with_one_sequence_has_no_other_prefix():
    told = (
        "data: has no two held-out sequences of 8 tokens to compare; prepare more of them, or leave out the task prefix"
    )
    with pytest.raises(ValueError, match=told):
        held_out(Bucket(8, 1), Bucket(32, 2)).continued(8, Draws("a"))
    assert held_out(Bucket(8, 2), Bucket(32, 2)).continued(8, Draws("a"))[2] == 4
    with pytest.raises(
        ValueError, match="data: has no held-out documents; prepare the data with a larger data.held_out"
    ):
        held_out(Bucket(8, 0))
