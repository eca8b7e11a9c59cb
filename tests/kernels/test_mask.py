"""Masks as intervals, against a check of every (query, key) pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.plain_attention import visible_pairs
from hypothesis import given
from hypothesis import strategies as st
from longring.kernels.layout import SeqLayout
from longring.kernels.mask import BAND_ROWS, host_masks, make_mask, mask_rects


@st.composite
def layouts(draw, num_tokens: int = 40) -> tuple[SeqLayout, SeqLayout]:
    """Draw the layouts of queries and keys in one context, with arbitrary runs and documents."""
    starts = (0, *sorted(draw(st.sets(st.integers(1, num_tokens - 1), max_size=6))))

    def runs() -> tuple[tuple[int, int], ...]:
        edges = sorted(draw(st.sets(st.integers(0, num_tokens), min_size=2, max_size=6)))
        return tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=False))

    return SeqLayout(runs(), starts), SeqLayout(runs(), starts)


masks = st.one_of(
    st.just({"causal": True}),
    st.just({"causal": False}),
    st.builds(lambda w: {"causal": True, "window": w}, st.integers(1, 45)),
)


@given(layouts(), masks)
def test_rows_and_columns_hold_the_visible_pairs(tile, kind):
    exact = visible_pairs(*tile, **kind).numpy()
    mask = make_mask(*tile, **kind)
    rows, columns = mask.rows.numpy(), mask.columns.numpy()  # [2, s_q], [2, s_k]
    j, i = np.arange(exact.shape[1]), np.arange(exact.shape[0])
    np.testing.assert_array_equal((rows[0][:, None] <= j) & (j < rows[1][:, None]), exact)
    np.testing.assert_array_equal(((columns[0][:, None] <= i) & (i < columns[1][:, None])).T, exact)
    assert (np.diff(rows) >= 0).all() and (np.diff(columns) >= 0).all()
    assert mask.num_pairs == exact.sum()


@given(layouts(), masks)
def test_rectangles_cover_each_visible_pair_once(tile, kind):
    exact = visible_pairs(*tile, **kind).numpy()
    count = np.zeros(exact.shape, int)
    # count [s_q, s_k] sums the rectangles; each pair's total must be 1 if it is visible, and 0 otherwise.
    for rect in mask_rects(make_mask(*tile, **kind).host_rows):
        part = count[rect.rows, rect.keys]
        if rect.kind == "full":
            part += 1
        elif rect.kind == "causal":
            assert part.shape[0] == part.shape[1]
            part += np.tri(part.shape[0], dtype=int)
        else:
            assert exact[rect.rows, rect.keys].any(1).all(), "every row of a band must see a key"
            part += exact[rect.rows, rect.keys]
    np.testing.assert_array_equal(count, exact)


def test_common_masks_need_few_rectangles():
    whole = SeqLayout.contiguous(4096)
    assert [p.kind for p in mask_rects(make_mask(whole, whole).host_rows)] == ["causal"]
    assert [p.kind for p in mask_rects(make_mask(whole, whole, causal=False).host_rows)] == ["full"]
    packed = SeqLayout.packed((1000, 96, 3000))
    assert [p.kind for p in mask_rects(make_mask(packed, packed).host_rows)] == ["causal"] * 3
    # An attention window of w keys costs at most w + BAND_ROWS per row, not the whole square.
    windowed = mask_rects(make_mask(whole, whole, window=256).host_rows)
    area = sum((p.rows.stop - p.rows.start) * (p.keys.stop - p.keys.start) for p in windowed)
    assert area <= 4096 * (256 + BAND_ROWS)


def test_mask_of_a_million_tokens():
    packed = SeqLayout.packed((4096,) * 256)
    mask = make_mask(packed, packed)
    assert mask.rows.dtype == torch.int32
    assert mask.num_pairs == 256 * 4096 * 4097 // 2


def test_bad_masks_raise():
    packed, whole = SeqLayout.packed((3, 5)), SeqLayout.contiguous(8)
    with pytest.raises(ValueError, match="take both layouts from one context"):
        make_mask(packed, whole)
    with pytest.raises(ValueError, match="window = 0: must be at least 1; give None for no window"):
        make_mask(whole, whole, window=0)
    assert make_mask(whole, whole, window=None).num_pairs == 36
    with pytest.raises(ValueError, match="window = 4 with causal = False: .*; set causal = True"):
        make_mask(whole, whole, causal=False, window=4)
    assert make_mask(whole, whole, causal=True, window=4).num_pairs == 26


@pytest.mark.parametrize("starts", [(), (1,), (0, 5, 5), (0, 7, 3)])
def test_bad_document_starts_raise(starts):
    with pytest.raises(ValueError, match="document_starts = .*: must ascend strictly from 0"):
        SeqLayout(((0, 8),), starts)


def test_bad_runs_raise():
    with pytest.raises(ValueError, match="layout.runs = .*: must be non-empty intervals in ascending order"):
        SeqLayout(((4, 8), (0, 4)))


@pytest.mark.parametrize("window", [None, 3])
def test_masks_of_several_tiles_in_one_tensor_are_those_of_each(window):
    packed, late = SeqLayout.packed((3, 1, 7)), SeqLayout(((2, 4), (9, 11)), (0, 3, 4))
    tiles = [(packed, packed), (late, packed), (packed, late)]
    for mask, tile in zip(host_masks(tiles, window=window).on(torch.device("cpu")), tiles, strict=True):
        alone = make_mask(*tile, window=window)
        for name in ("rows", "columns", "host_rows"):
            assert torch.equal(getattr(mask, name), getattr(alone, name))
