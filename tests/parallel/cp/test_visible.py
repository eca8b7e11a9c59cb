"""Visibility between two shares in closed form, compared with every pair of positions checked by itself."""

from __future__ import annotations

import pytest
from helpers.plain_attention import visible_pairs
from hypothesis import given
from hypothesis import strategies as st
from longring.kernels.layout import SeqLayout
from longring.parallel.cp.layout import zigzag
from longring.parallel.cp.visible import Shares, Visibility, num_pairs, visible_rows

NUM_TOKENS = 40


@st.composite
def shares(draw) -> tuple[SeqLayout, SeqLayout]:
    """Draw two shares of one context, with arbitrary runs, which may overlap, and arbitrary documents."""
    starts = (0, *sorted(draw(st.sets(st.integers(1, NUM_TOKENS - 1), max_size=6))))

    def runs() -> tuple[tuple[int, int], ...]:
        edges = sorted(draw(st.sets(st.integers(0, NUM_TOKENS), min_size=2, max_size=8)))
        return tuple(zip(edges[::2], edges[1::2], strict=False))

    return SeqLayout(runs(), starts), SeqLayout(runs(), starts)


visibilities = st.one_of(
    st.just(Visibility()),
    st.just(Visibility(causal=False)),
    st.builds(Visibility, st.just(True), st.integers(1, NUM_TOKENS + 5)),
)


def rows_of(
    queries: SeqLayout, keys: SeqLayout, visibility: Visibility
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Return `visible_rows` of one pair of shares."""
    a, b, c, d = visible_rows(Shares.of([queries]), Shares.of([keys]), visibility)[0].tolist()
    return ((a, b), (c, d)) if a < b else None


def pairs_of(queries: SeqLayout, keys: SeqLayout, visibility: Visibility) -> int:
    """Return `num_pairs` of one pair of shares."""
    return int(num_pairs(Shares.of([queries]), Shares.of([keys]), visibility)[0])


@given(shares(), visibilities)
def test_rows_are_the_smallest_ranges_that_take_part(share: tuple[SeqLayout, SeqLayout], visibility):
    exact = visible_pairs(*share, visibility.causal, visibility.window)
    if not exact.any():
        assert rows_of(*share, visibility) is None
        return
    queries, keys = exact.any(1).nonzero().flatten().tolist(), exact.any(0).nonzero().flatten().tolist()
    assert rows_of(*share, visibility) == ((queries[0], queries[-1] + 1), (keys[0], keys[-1] + 1))


@given(shares(), visibilities)
def test_pairs_are_counted(share: tuple[SeqLayout, SeqLayout], visibility):
    assert pairs_of(*share, visibility) == int(visible_pairs(*share, visibility.causal, visibility.window).sum())


@pytest.mark.parametrize("visibility", [Visibility(), Visibility(window=4096)], ids=["causal", "window"])
def test_the_whole_is_counted_at_a_million_tokens(visibility):
    """The tiles of all ranks together have all visible pairs; a million tokens need no loop over tokens."""
    num_tokens, size = 2**20, 16
    starts = (0, 4096, 5000, 500_001, num_tokens - 1)
    shares = [SeqLayout(zigzag(num_tokens, rank, size).runs, starts) for rank in range(size)]
    pairs = sum(pairs_of(queries, keys, visibility) for queries in shares for keys in shares)
    width = visibility.window or num_tokens
    lengths = [b - a for a, b in zip(starts, (*starts[1:], num_tokens), strict=True)]
    full = [min(length, width) for length in lengths]
    assert pairs == sum(n * (n + 1) // 2 + (length - n) * width for n, length in zip(full, lengths, strict=True))


@pytest.mark.parametrize(("causal", "window"), [(False, 4), (True, 0), (True, -1)])
def test_a_window_is_causal_and_not_empty(causal, window):
    with pytest.raises(ValueError, match=f"window = {window} with causal = {causal}"):
        Visibility(causal, window)
