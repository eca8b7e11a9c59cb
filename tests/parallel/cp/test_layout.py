"""Layouts of a sequence over ranks: every position is held exactly once, and the work is balanced."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from longring.kernels.layout import SeqLayout
from longring.kernels.mask import make_mask, mask_rects
from longring.parallel.cp.layout import contiguous, joined, zigzag

sizes = st.integers(1, 40)
spare_tokens = st.integers(0, 200)


def held(layout: SeqLayout) -> list[int]:
    return [position for start, stop in layout.runs for position in range(start, stop)]


def test_zigzag_as_integers():
    assert [zigzag(16, rank, 4).runs for rank in range(4)] == [
        ((0, 2), (14, 16)),
        ((2, 4), (12, 14)),
        ((4, 6), (10, 12)),
        ((6, 8), (8, 10)),
    ]
    # 11 tokens over 4 chunks: 2, 3, 3, 3.
    assert [zigzag(11, rank, 2).runs for rank in range(2)] == [((0, 2), (8, 11)), ((2, 5), (5, 8))]


@given(sizes, spare_tokens)
def test_zigzag_shares_are_disjoint_and_complete(size, spare):
    num_tokens = 2 * size + spare
    shares = [zigzag(num_tokens, rank, size) for rank in range(size)]
    assert sorted(position for share in shares for position in held(share)) == list(range(num_tokens))
    chunks = [stop - start for share in shares for start, stop in share.runs]
    assert len(chunks) == 2 * size
    assert max(chunks) - min(chunks) <= 1
    # The two chunks of a rank are mirror images: as many chunks lie before the first as after the second.
    edges = sorted(run for share in shares for run in share.runs)
    assert [share.runs for share in shares] == [(edges[rank], edges[-1 - rank]) for rank in range(size)]


@given(sizes, spare_tokens)
def test_zigzag_balances_visible_pairs(size, spare):
    """Every rank has an equal share of all visible pairs, up to one row at each edge of an uneven cut."""
    num_tokens = 2 * size + spare
    for rank in range(size):
        pairs = sum(position + 1 for position in held(zigzag(num_tokens, rank, size)))
        share = num_tokens * (num_tokens + 1) / 2 / size
        slack = 0 if num_tokens % (2 * size) == 0 else num_tokens + num_tokens / (2 * size) + 1
        assert abs(pairs - share) <= slack


@given(st.integers(1, 8), st.integers(1, 8), spare_tokens)
def test_adjacent_ranks_together_hold_a_coarser_zigzag(positions, heads, spare):
    """The ranks of a grid position together hold the tokens of a coarser zigzag; the heads axis relies on it."""
    num_tokens = 2 * positions * heads + spare
    shares = [zigzag(num_tokens, rank, positions * heads) for rank in range(positions * heads)]
    for position in range(positions):
        together = joined(shares[position * heads : (position + 1) * heads])
        assert held(together) == held(zigzag(num_tokens, position, positions))


def test_zigzag_of_one_rank_is_a_plain_causal_sequence():
    layout = zigzag(9, 0, 1)
    assert held(layout) == list(range(9))
    assert [rect.kind for rect in mask_rects(make_mask(layout, layout).host_rows)] == ["causal"]


@given(sizes, spare_tokens)
def test_contiguous_shares_are_disjoint_and_complete(size, spare):
    num_tokens = size + spare
    shares = [contiguous(num_tokens, rank, size) for rank in range(size)]
    assert [position for share in shares for position in held(share)] == list(range(num_tokens))
    assert all(len(share.runs) == 1 for share in shares)
    lengths = [share.num_tokens for share in shares]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(("num_tokens", "rank", "size"), [(7, 0, 4), (1, 0, 1), (16, 4, 4), (16, -1, 4)])
def test_zigzag_refuses(num_tokens, rank, size):
    with pytest.raises(
        ValueError, match=f"zigzag: (rank = {rank}|num_tokens = {num_tokens}): (must be at least 0|cannot be cut)"
    ):
        zigzag(num_tokens, rank, size)


@pytest.mark.parametrize(("num_tokens", "rank", "size"), [(3, 0, 4), (16, 4, 4), (16, -1, 4)])
def test_contiguous_refuses(num_tokens, rank, size):
    with pytest.raises(
        ValueError, match=f"contiguous: (rank = {rank}|num_tokens = {num_tokens}): (must be at least 0|cannot be cut)"
    ):
        contiguous(num_tokens, rank, size)


def test_joined_merges_what_touches_and_keeps_documents():
    starts = (0, 3)
    parts = [SeqLayout(((4, 6), (9, 10)), starts), SeqLayout(((0, 2), (6, 7)), starts)]
    assert joined(parts) == SeqLayout(((0, 2), (4, 7), (9, 10)), starts)


@st.composite
def layouts(draw) -> SeqLayout:
    edges = sorted(draw(st.sets(st.integers(0, 40), min_size=2, max_size=8)))
    starts = (0, *sorted(draw(st.sets(st.integers(1, 39), max_size=4))))
    return SeqLayout(tuple(zip(edges[::2], edges[1::2], strict=False)), starts)


@given(layouts())
def test_row_of_is_the_index_among_the_positions_held(layout):
    positions = held(layout)
    for position in range(42):
        if position in positions:
            assert layout.row_of(position) == positions.index(position)
        else:
            with pytest.raises(ValueError, match=f"position = {position}: must lie in the layout's runs"):
                layout.row_of(position)


@given(layouts(), st.data())
def test_part_holds_the_positions_of_the_rows(layout, data):
    positions = held(layout)
    start = data.draw(st.integers(0, len(positions) - 1))
    stop = data.draw(st.integers(start + 1, len(positions)))
    part = layout.part([(start, stop)])
    assert held(part) == positions[start:stop]
    assert part.document_starts == layout.document_starts
