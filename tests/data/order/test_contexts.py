"""Every pair of the path's documents lies in exactly one sequence, in the order of the path."""

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from longring.data.format.document import NO_DOCUMENT
from longring.data.order.contexts import (
    Layout,
    contexts_to_fill,
    lay_in_context,
    lay_long_buckets,
    read_sequence,
    stored,
)
from longring.data.prepare.decompose import decompose

BOUNDARY = 0


class Streams:
    """Documents B x1 ... xn B instead of prepared ones; every text token encodes its document and position."""

    def __init__(self, pairs: list[int]):
        self.manifest = SimpleNamespace(dtype="<u4")
        self.streams = [[BOUNDARY, *(1_000 * (d + 1) + i for i in range(n - 1)), BOUNDARY] for d, n in enumerate(pairs)]

    def tokens(self, number: int, offset: int, pairs: int) -> np.ndarray:
        assert offset >= 0
        assert offset + pairs < len(self.streams[number])
        return np.array(self.streams[number][offset : offset + pairs + 1], dtype="<u4")


def sequences(documents: Any, layout: Layout, length: int) -> list[tuple[list[int], list[tuple[int, int, int]]]]:
    found = [read_sequence(documents, layout, length, n, BOUNDARY) for n in range(layout.sequences(length))]
    return [(row.tolist(), pieces) for row, pieces in found]


def check(documents: Streams, layout: Layout, path: list[int], lengths: tuple[int, ...]) -> None:
    """Assert that every target comes once, after its own input, or after B where a piece begins in a sequence."""
    covered: Counter[tuple[int, int]] = Counter()
    joined: list[tuple[int, int, int]] = []
    filler = 0
    for length in lengths:
        for number, (row, pieces) in enumerate(sequences(documents, layout, length)):
            assert len(row) == length + 1
            assert pieces[0][2] == 0
            ends = [position for _, _, position in pieces[1:]] + [length]
            for (document, offset, position), end in zip(pieces, ends, strict=True):
                assert end > position
                if document == NO_DOCUMENT:
                    filler += end - position
                    assert set(row[position : end + 1]) == {BOUNDARY}
                    continue
                stream = documents.streams[document]
                assert row[position + 1 : end + 1] == stream[offset + 1 : offset + end - position + 1]
                assert row[position] in ([stream[offset], BOUNDARY] if position == 0 else [BOUNDARY])
                covered.update((document, pair) for pair in range(offset, offset + end - position))
                if number >= len(layout.own[length]):
                    start = int(layout.contexts[length][number - len(layout.own[length])])
                    joined.append((start + position, document, offset))
    assert covered == Counter((d, pair) for d in path for pair in range(len(documents.streams[d]) - 1))
    assert filler < lengths[0]
    # Along the joined stream documents come as they do along the path.
    indices = [path.index(document) for _, document, _ in sorted(joined)]
    assert indices == sorted(indices)
    for (_, one, offset), (_, other, following) in zip(sorted(joined), sorted(joined)[1:], strict=False):
        assert one != other or following > offset


SIZES = st.lists(st.one_of(st.integers(1, 12), st.integers(1, 150)), min_size=1, max_size=15)


@settings(max_examples=150)
@given(pairs=SIZES, length=st.sampled_from([4, 8, 32]), draw=st.randoms(use_true_random=False))
def test_in_context_cuts_the_path(pairs: list[int], length: int, draw: Any):
    documents, path = Streams(pairs), draw.sample(range(len(pairs)), draw.randint(1, len(pairs)))
    layout = lay_in_context(np.array(path, dtype=np.uint32), np.array(pairs), length)
    check(documents, layout, path, (length,))
    total = sum(pairs[document] for document in path)
    assert layout.sequences(length) == -(-total // length)
    # The stream's targets, one context after the other, are the documents' along the path.
    targets = [token for row, _ in sequences(documents, layout, length) for token in row[1:]]
    assert targets[:total] == [token for document in path for token in documents.streams[document][1:]]


@settings(max_examples=150)
@given(pairs=SIZES, lengths=st.sampled_from([(8,), (8, 16), (4, 8, 16, 32)]), draw=st.randoms(use_true_random=False))
def test_long_buckets_keep_long_documents_and_take_the_rest(pairs: list[int], lengths: tuple[int, ...], draw: Any):
    documents, path = Streams(pairs), draw.sample(range(len(pairs)), draw.randint(1, len(pairs)))
    layout = lay_long_buckets(np.array(path, dtype=np.uint32), np.array(pairs), lengths, (0,))
    check(documents, layout, path, lengths)
    own = sorted((int(d), int(offset), length) for length in lengths for d, offset in layout.own[length])
    expected = [(d, *piece) for d in path for piece in decompose(pairs[d], lengths)]
    assert own == sorted(expected), "the pieces of dataset decomposition"
    # A tail whose beginning lies elsewhere begins with a boundary, wherever it lies.
    for length in lengths:
        for row, pieces in sequences(documents, layout, length)[len(layout.own[length]) :]:
            tails = [
                (position, pairs[d] % lengths[0] == pairs[d] - offset)
                for d, offset, position in pieces
                if d != NO_DOCUMENT
            ]
            assert all(row[position] == BOUNDARY for position, begins in tails if begins)
    begins = sorted((int(start), length) for length in lengths for start in layout.contexts[length])
    assert all(start + length == following for (start, length), (following, _) in pairwise(begins))


@settings(max_examples=200)
@given(own=st.lists(st.integers(0, 60), min_size=1, max_size=5), joined=st.integers(0, 5_000))
def test_the_thinnest_buckets_are_filled(own: list[int], joined: int):
    lengths = [8 << bucket for bucket in range(len(own))]
    tokens = {length: length * count for length, count in zip(lengths, own, strict=True)}
    contexts = contexts_to_fill(tokens, joined)
    added = {length: length * contexts[length] for length in lengths}
    assert 0 <= sum(added.values()) - joined < 8
    filled = {length: tokens[length] + added[length] for length in lengths}
    # Less than a context of each length is left over by rounding and goes to the shortest; but for that no bucket was
    # raised while another stayed lower.
    raised = [length for length in lengths if added[length] > (sum(lengths) if length == 8 else 0)]
    slack = {length: 2 * sum(lengths) if length == 8 else max(lengths) for length in lengths}
    assert all(filled[one] <= filled[other] + slack[one] for one in raised for other in lengths)


def test_contexts_of_all_lengths_lie_along_the_whole_path():
    layout = lay_long_buckets(np.arange(400, dtype=np.uint32), np.full(400, 7), (8, 16, 32), (1,))
    assert all(len(layout.contexts[length]) > 20 for length in (8, 16, 32))
    middles = [np.mean(layout.contexts[length]) / layout.starts[-1] for length in (8, 16, 32)]
    assert all(0.35 < middle < 0.65 for middle in middles)


def test_worked_example_of_filling():
    assert contexts_to_fill({8: 80, 16: 0, 32: 32}, 120) == {8: 3, 16: 4, 32: 1}  # level 76: 0, 64 and 32; 24 are left
    assert contexts_to_fill({8: 80, 16: 0, 32: 32}, 0) == {8: 0, 16: 0, 32: 0}


@pytest.mark.parametrize("count", [1, 7, 3_000])
def test_neighbouring_contexts_are_stored_apart(count: int):
    layout = lay_in_context(np.arange(count, dtype=np.uint32), np.full(count, 4), 4)
    order = stored(layout, 4, 3, "train", np.arange(count))
    assert sorted(order.tolist()) == list(range(count))
    assert np.array_equal(order[2:5], stored(layout, 4, 3, "train", np.arange(2, 5)[: max(count - 2, 0)]))
    if count > 1_000:
        assert np.mean(np.abs(np.diff(order)) < 10) < 0.02
        assert not np.array_equal(order, stored(layout, 4, 4, "train", np.arange(count)))
