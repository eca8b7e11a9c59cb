"""Visibility between shares in closed form, compared with every pair of positions checked by itself."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.plain_attention import visible_pairs
from hypothesis import given
from hypothesis import strategies as st
from longring.kernels.layout import SeqLayout
from longring.parallel.cp.layout import joined, zigzag
from longring.parallel.cp.visible import NONE, Pieces, Tokens, Visibility, hull, pairs_between, rows_needed

NUM_TOKENS = 40
OWNERS = 3


@st.composite
def shares(draw) -> list[SeqLayout]:
    """Draw the shares of one context, with arbitrary runs and documents; some positions may be in none of them."""
    starts = (0, *sorted(draw(st.sets(st.integers(1, NUM_TOKENS - 1), max_size=6))))
    owners = draw(st.lists(st.integers(0, OWNERS), min_size=NUM_TOKENS, max_size=NUM_TOKENS))
    owners[:OWNERS] = range(OWNERS)  # no share is empty
    of = [[SeqLayout(((p, p + 1),), starts) for p in range(NUM_TOKENS) if owners[p] == n] for n in range(OWNERS)]
    return [joined(runs) for runs in of]


visibilities = st.one_of(
    st.just(Visibility()),
    st.just(Visibility(causal=False)),
    st.builds(Visibility, st.just(True), st.integers(1, NUM_TOKENS + 5)),
)


@given(shares(), visibilities, st.lists(st.integers(0, 1), min_size=OWNERS, max_size=OWNERS), st.booleans())
def test_rows_are_the_smallest_ranges_that_take_part(layouts: list[SeqLayout], visibility, line, all_documents):
    """Each piece of a document is held against the tokens of each line of shares; `hull` is that of a share."""
    pieces = Pieces.of(layouts) if all_documents else Pieces.of(layouts).of_shared_documents()
    lines = np.array(line)
    for side in ("queries", "keys"):
        found = rows_needed(pieces, side, Tokens(pieces, lines), np.arange(2), visibility)
        hulls = hull(found, pieces.owner, OWNERS)
        for number in range(2):
            others = [layout for layout, at in zip(layouts, line, strict=True) if at == number]
            for owner, mine in enumerate(layouts):
                seen = np.zeros(mine.num_tokens, bool)
                for other in others:
                    if not all_documents and other is mine:
                        continue  # pieces of documents that this share holds alone are left out
                    pair = (mine, other) if side == "queries" else (other, mine)
                    exact = visible_pairs(*pair, visibility.causal, visibility.window).numpy()
                    seen |= exact.any(1) if side == "queries" else exact.any(0)
                if not all_documents and any(other is mine for other in others):
                    continue
                at = pieces.owner == owner
                lengths = (pieces.stop - pieces.start)[at].tolist()
                for row, length, got in zip(pieces.row[at].tolist(), lengths, found[number, at], strict=True):
                    assert got.tolist() == span_of(seen, row, row + length)
                assert hulls[number, owner].tolist() == span_of(seen, 0, len(seen))


def span_of(seen: np.ndarray, start: int, stop: int) -> list[int]:
    rows = np.flatnonzero(seen[start:stop])
    return [start + int(rows[0]), start + int(rows[-1]) + 1] if len(rows) else NONE.tolist()


@given(shares(), visibilities)
def test_pairs_are_counted(layouts: list[SeqLayout], visibility):
    found = pairs_between(Pieces.of(layouts), OWNERS, visibility)
    exact = [[int(visible_pairs(a, b, visibility.causal, visibility.window).sum()) for b in layouts] for a in layouts]
    assert found.tolist() == exact


@pytest.mark.parametrize("visibility", [Visibility(), Visibility(window=4096)], ids=["causal", "window"])
def test_the_whole_is_counted_at_a_million_tokens(visibility):
    """The tiles of all ranks together have all visible pairs; a million tokens need no loop over tokens."""
    num_tokens, size = 2**20, 16
    starts = (0, 4096, 5000, 500_001, num_tokens - 1)
    layouts = [SeqLayout(zigzag(num_tokens, rank, size).runs, starts) for rank in range(size)]
    pairs = int(pairs_between(Pieces.of(layouts), size, visibility).sum())
    width = visibility.window or num_tokens
    lengths = [b - a for a, b in zip(starts, (*starts[1:], num_tokens), strict=True)]
    full = [min(length, width) for length in lengths]
    assert pairs == sum(n * (n + 1) // 2 + (length - n) * width for n, length in zip(full, lengths, strict=True))


@pytest.mark.parametrize(("causal", "window"), [(False, 4), (True, 0), (True, -1)])
def test_a_window_is_causal_and_not_empty(causal, window):
    with pytest.raises(ValueError, match=f"window = {window} with causal = {causal}"):
        Visibility(causal, window)
