"""Layouts of packed documents: every position is held once, tokens and work are equal, documents stay together."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from longring.kernels.layout import SeqLayout
from longring.parallel.cp.layout import joined, zigzag
from longring.parallel.cp.packed import FULL, Runs, Windows, balanced, divided, typical_packing, whole_documents
from longring.parallel.cp.visible import Pieces, Visibility, pairs_between


@st.composite
def packings(draw) -> tuple[int, tuple[int, ...], int]:
    """Draw a number of tokens, document starts and a number of ranks."""
    size = draw(st.integers(1, 12))
    num_tokens = 2 * size + draw(st.integers(0, 300))
    return num_tokens, (0, *sorted(draw(st.sets(st.integers(1, num_tokens - 1), max_size=30)))), size


def lognormal(mean: int, num_tokens: int, seed: int) -> tuple[int, ...]:
    """Return the starts of documents of random lengths with this mean."""
    rng, starts = random.Random(seed), [0]
    while starts[-1] < num_tokens:
        starts.append(starts[-1] + max(16, int(rng.lognormvariate(np.log(mean) - 0.5, 1.0))))
    return tuple(starts[:-1])


def work_of(shares: list[Runs], starts: tuple[int, ...], windows: Windows = FULL) -> np.ndarray:
    """Return the number of visible pairs of each rank's queries in all layers."""
    pieces = Pieces.of_runs(shares, starts)
    of_windows = [number * pairs_between(pieces, len(shares), Visibility(window=of)) for of, number in windows]
    return np.sum(of_windows, axis=(0, 2))


@pytest.mark.parametrize("layout", [balanced, whole_documents, partial(whole_documents, ranks_per_node=3)])
@given(packings())
def test_every_position_is_held_once_and_ranks_hold_as_many_as_in_zigzag(layout: Callable[..., list[Runs]], packing):
    num_tokens, starts, size = packing
    shares = layout(num_tokens, starts, size)
    held = sorted(position for runs in shares for start, stop in runs for position in range(start, stop))
    assert held == list(range(num_tokens))
    tokens = [SeqLayout(runs).num_tokens for runs in shares]
    assert tokens == [zigzag(num_tokens, rank, size).num_tokens for rank in range(size)]
    assert all(before[1] < after[0] for runs in shares for before, after in pairwise(runs)), "touching runs are one"


@given(packings())
def test_balanced_work_is_equal_up_to_some_tokens(packing):
    num_tokens, starts, size = packing
    num_tokens -= num_tokens % (2 * size)
    starts = tuple(start for start in starts if start < num_tokens)
    work = work_of(balanced(num_tokens, starts, size), starts)
    longest = max(b - a for a, b in pairwise((*starts, num_tokens)))
    assert np.abs(work - work.mean()).max() <= 4 * longest


@pytest.mark.parametrize("mean", [2_000, 8_000, 20_000, 60_000])
@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("windows", [FULL, ((1024, 1),), ((1024, 3), (None, 1))])
def test_balanced_work_is_equal_in_all_layers_together(mean, size, windows):
    """Zigzag has 1.03 to 2.7 of the mean on these."""
    for seed in range(4):
        starts = lognormal(mean, 8192 * size, seed)
        work = work_of(balanced(8192 * size, starts, size, windows), starts, windows)
        assert work.max() <= 1.002 * work.mean()


@given(st.integers(2, 10**6), st.integers(1, 10**5))
def test_a_typical_packing_ascends_from_0_and_has_the_mean(num_tokens, mean):
    starts = typical_packing(num_tokens, mean)
    assert starts[0] == 0 and all(a < b for a, b in pairwise((*starts, num_tokens)))
    assert len(starts) <= max(1, num_tokens // mean)
    if mean > 1000 and num_tokens < 100 * mean:
        assert len(starts) == max(1, num_tokens // mean)


def test_documents_that_fit_are_whole():
    """Documents of a quarter of a rank's tokens, shuffled with some of a half: none is cut."""
    lengths = [32] * 40 + [64] * 12
    random.Random(0).shuffle(lengths)
    starts = tuple(accumulate(lengths[:-1], initial=0))
    documents = set(zip(starts, (*starts[1:], sum(lengths)), strict=True))
    edges = {start for start, _ in documents} | {sum(lengths)}
    for runs in whole_documents(sum(lengths), starts, 16):
        assert all(start in edges and stop in edges for start, stop in runs)


@pytest.mark.parametrize("windows", [FULL, ((1024, 3), (None, 1))])
@pytest.mark.parametrize(("size", "per_node"), [(16, 8), (32, 8), (12, 5)])
def test_over_nodes_documents_that_fit_are_on_one_node_whose_ranks_have_equal_work(size, per_node, windows):
    """Only the last documents, for which no node has room, are cut between nodes."""
    for seed in range(4):
        starts = lognormal(2000, num_tokens := 8192 * size, seed)
        shares = whole_documents(num_tokens, starts, size, windows, per_node)
        work = work_of(shares, starts, windows)
        for first in range(0, size, per_node):
            of_node = work[first : first + per_node]
            assert of_node.max() <= 1.002 * of_node.mean()
        pieces = Pieces.of_runs(shares, starts)
        node = pieces.owner // per_node
        cut = [d for d in range(len(starts)) if len(set(node[pieces.document == d].tolist())) > 1]
        lengths = np.diff((*starts, num_tokens))
        assert len(cut) < -(-size // per_node) and all(lengths[d] <= np.median(lengths) for d in cut)


def test_one_node_is_as_no_nodes():
    starts = lognormal(2000, 8192 * 8, 0)
    alone = whole_documents(8192 * 8, starts, 8)
    assert whole_documents(8192 * 8, starts, 8, FULL, 8) == whole_documents(8192 * 8, starts, 8, FULL, 9) == alone
    assert whole_documents(8192 * 8, starts, 8, FULL, 1) == alone != whole_documents(8192 * 8, starts, 8, FULL, 4)


def test_a_document_longer_than_a_rank_is_cut_from_both_ends():
    assert whole_documents(64, (0, 48), 2) == [((0, 16), (32, 48)), ((16, 32), (48, 64))]
    assert balanced(64, (0, 48), 2) == [((0, 12), (36, 52), (60, 64)), ((12, 36), (52, 60))]


@pytest.mark.parametrize("layout", ["zigzag", "balanced", "documents"])
def test_one_document_is_in_zigzag(layout):
    assert divided(layout, 60, (0,), 4) == [joined([zigzag(60, rank, 4)]).runs for rank in range(4)]


@given(st.integers(1, 12), st.integers(1, 20))
def test_balanced_layout_of_one_document_is_zigzag(size, chunk):
    num_tokens = 2 * size * chunk
    assert balanced(num_tokens, (0,), size) == [joined([zigzag(num_tokens, rank, size)]).runs for rank in range(size)]
