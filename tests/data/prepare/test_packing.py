from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from longring.data.format.document import NO_DOCUMENT
from longring.data.prepare import packing
from longring.data.prepare.packing import BestFitPacker, Concatenator, Row, Segment, best_fit

B = 0


def document(number: int, text_tokens: int) -> np.ndarray:
    """Return B x1 ... xn B, [n + 2]; every x encodes its document and position."""
    return np.array([B, *(1_000 * (number + 1) + pair for pair in range(text_tokens)), B], dtype=np.uint32)


def pairs_of(row: Row, *, restart: bool) -> list[tuple[int, int, int, int]]:
    """Return (document, pair, input, target) for all pairs of a row, read from its tokens."""
    pairs, start = [], 0
    for segment in row.segments:
        for pair in range(segment.pairs):
            source, target = row.tokens[start + pair : start + pair + 2].tolist()
            pairs += [(segment.document, segment.offset + pair, source, target)]
        assert not restart or row.tokens[start] == B
        start += segment.pairs
    assert start == len(row.tokens) - 1
    return pairs


def naive_best_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """Return the bins of best-fit decreasing by a search through every bin for every item."""
    bins: list[list[int]] = []
    became: list[int] = []
    for time, item in enumerate(sorted(range(len(sizes)), key=lambda number: -sizes[number])):
        rooms = [capacity - sum(sizes[other] for other in entry) for entry in bins]
        fitting = [index for index, room in enumerate(rooms) if room >= sizes[item]]
        if fitting:
            chosen = min(fitting, key=lambda index: (rooms[index], -became[index]))
            bins[chosen].append(item)
            became[chosen] = time
        else:
            bins.append([item])
            became.append(time)
    return bins


@given(st.lists(st.integers(1, 16), max_size=60), st.integers(16, 20))
def test_best_fit_is_what_looking_at_every_bin_gives(sizes: list[int], capacity: int):
    assert best_fit(sizes, capacity) == naive_best_fit(sizes, capacity)


@given(st.lists(st.integers(1, 15), min_size=1, max_size=80), st.sampled_from([16, 40, 10_000]))
def test_packing_keeps_every_pair_and_fills_every_row(lengths: list[int], pool: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "POOL_TOKENS", pool)
        packer = BestFitPacker(16, B)
        streams = [document(number, length) for number, length in enumerate(lengths)]
        rows: list[Row] = []
        for number, stream in enumerate(streams):
            # Odd documents come without their first two pairs, as the tails of decomposed documents do.
            offset = 2 * (number % 2) if len(stream) > 4 else 0
            rows += packer.add(Segment(stream[offset:], number, offset))
        rows += packer.finish()
    expected = {
        (number, pair, int(stream[pair + 1]))
        for number, stream in enumerate(streams)
        for pair in range(2 * (number % 2) if len(stream) > 4 else 0, len(stream) - 1)
    }
    found = Counter(pair for row in rows for pair in pairs_of(row, restart=True))
    assert set(found.values()) == {1}
    real = {(number, pair, target) for number, pair, _, target in found if number != NO_DOCUMENT}
    assert real == expected
    filler = [entry for entry in found.elements() if entry[0] == NO_DOCUMENT]
    assert len(filler) == packer.filler < 16
    assert {(source, target) for _, _, source, target in filler} <= {(B, B)}
    assert sum(map(len, (row.tokens for row in rows))) == 17 * len(rows)
    # Inputs are the document's own, except where a segment begins inside it.
    for number, pair, source, _ in found:
        if number != NO_DOCUMENT:
            assert source in (B, streams[number][pair])


def test_few_documents_are_cut():
    """Few of 2,000 short documents are cut; concatenation would cut one for each of the 813 rows."""
    sizes = np.random.default_rng(0).integers(2, 200, 2_000)
    packer = BestFitPacker(256, B)
    rows = [row for number, size in enumerate(sizes) for row in packer.add(Segment(document(number, size), number, 0))]
    rows += packer.finish()
    pieces = Counter(segment.document for row in rows for segment in row.segments)
    assert sum(count > 1 for count in pieces.values()) < 20
    assert len(rows) == 813


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.sampled_from([4, 16, 64]))
def test_concatenation_is_the_streams_end_to_end(lengths: list[int], row_length: int):
    streams = [document(number, length) for number, length in enumerate(lengths)]
    chain = Concatenator(row_length)
    rows = [row for number, stream in enumerate(streams) for row in chain.add(Segment(stream, number, 0))]
    whole = np.concatenate([*(stream[:-1] for stream in streams), [B]])
    assert len(rows) == (len(whole) - 1) // row_length
    for number, row in enumerate(rows):
        assert row.tokens.tolist() == whole[number * row_length : (number + 1) * row_length + 1].tolist()
    pairs = [pair for row in rows for pair in pairs_of(row, restart=False)]
    left = [(s.document, s.offset + pair) for s in chain.left_over for pair in range(s.pairs)]
    assert [pair[:2] for pair in pairs] + left == [
        (number, pair) for number, stream in enumerate(streams) for pair in range(len(stream) - 1)
    ]
