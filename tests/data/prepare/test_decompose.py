import hashlib
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from longring.data.config import DataConfig
from longring.data.prepare.decompose import decompose, split_of


def bucket_lengths(low: int, high: int) -> tuple[int, ...]:
    return DataConfig(directory="x", min_bucket_tokens=low, max_bucket_tokens=high, shard_tokens=2**21).lengths


def digest(document: int) -> bytes:
    return hashlib.blake2b(str(document).encode(), digest_size=16).digest()


@pytest.mark.parametrize("lengths", [(), (0, 4), (8, 4), (4, 4)])
def test_lengths_ascend_from_1(lengths: tuple[int, ...]):
    with pytest.raises(ValueError, match="must ascend from 1 or more; sort them, and leave out those below 1"):
        decompose(10, lengths)
    assert decompose(10, sorted({*lengths, 4} - {0}))


def test_bucket_lengths_are_the_powers_of_two_in_between():
    assert bucket_lengths(128, 1024) == (128, 256, 512, 1024)
    assert bucket_lengths(8, 8) == (8,)
    assert bucket_lengths(2**19, 2**21) == (2**19, 2**20, 2**21)
    for method in ("concat", "concat_masked", "best_fit"):
        assert DataConfig(directory="x", method=method, max_bucket_tokens=512).lengths == (512,)


@pytest.mark.parametrize(
    ("pairs", "pieces"),
    [
        (0, []),
        (7, []),
        (8, [(0, 8)]),
        (15, [(0, 8)]),
        (16, [(0, 16)]),
        (8 + 16 + 32 + 3, [(0, 32), (32, 16), (48, 8)]),
        (32 * 3 + 31, [(0, 32), (32, 32), (64, 32), (96, 16), (112, 8)]),
    ],
)
def test_pieces_by_hand(pairs: int, pieces: list[tuple[int, int]]):
    assert decompose(pairs, (8, 16, 32)) == pieces


def smallest_number_of_pieces(pairs: int, lengths: tuple[int, ...]) -> int:
    """Return the least number of pieces, by dynamic programming over every way to cut exactly `pairs` pairs."""
    best = [0] + [10**9] * pairs
    for total in range(1, pairs + 1):
        best[total] = min((best[total - length] + 1 for length in lengths if length <= total), default=10**9)
    return best[pairs]


@given(st.integers(0, 700), st.integers(0, 4), st.integers(0, 4))
def test_the_cut_is_adjacent_falling_and_the_coarsest(pairs: int, smallest: int, more: int):
    lengths = bucket_lengths(1 << smallest, 1 << (smallest + more))
    pieces = decompose(pairs, lengths)
    covered = [pair for offset, length in pieces for pair in range(offset, offset + length)]
    assert covered == list(range(pairs - pairs % lengths[0]))
    assert [piece.length for piece in pieces] == sorted((piece.length for piece in pieces), reverse=True)
    assert len(pieces) == smallest_number_of_pieces(len(covered), lengths)


@given(st.integers(0, 5_000), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**64))
def test_a_random_cut_is_adjacent_and_ends_like_the_other(pairs: int, smallest: int, more: int, seed: int):
    lengths = bucket_lengths(1 << smallest, 1 << (smallest + more))
    pieces = decompose(pairs, lengths, random.Random(seed))
    assert pieces == decompose(pairs, lengths, random.Random(seed))
    offset = 0
    for number, piece in enumerate(pieces):
        assert piece.offset == offset
        assert piece.length in lengths
        if pairs - offset < 2 * lengths[-1]:
            assert [entry.length for entry in pieces[number:]] == [
                entry.length for entry in decompose(pairs - offset, lengths)
            ]
            return
        offset += piece.length
    assert pairs < lengths[0]


def test_a_random_cut_draws_as_the_papers_code_does():
    """The probability of length 2^k among 256, ..., 8,192 is in proportion to 2^-k: 32/63, 16/63, ..., 1/63."""
    pieces = decompose(2**27, bucket_lengths(256, 8192), random.Random(0))
    drawn = Counter(piece.length for piece in pieces[:-10])
    total = drawn.total()
    for length, chance in zip((256, 512, 1024, 2048, 4096, 8192), (32, 16, 8, 4, 2, 1), strict=True):
        expected = chance / 63
        assert abs(drawn[length] / total - expected) < 5 * (expected * (1 - expected) / total) ** 0.5


def test_split_is_a_pure_function_with_the_asked_fraction():
    first = [split_of(digest(document), 7, 0.1) for document in range(20_000)]
    assert first[:100] == [split_of(digest(document), 7, 0.1) for document in range(100)]
    # Binomial: 2,000 expected, standard deviation 42.
    assert 1_800 < first.count("held_out") < 2_200
    other = [split_of(digest(document), 8, 0.1) for document in range(20_000)]
    both = sum(a == b == "held_out" for a, b in zip(first, other, strict=True))
    assert 120 < both < 290, "seeds choose independently: 200 expected"
    assert {split_of(digest(document), 7, 0.0) for document in range(1_000)} == {"train"}


def test_a_larger_fraction_only_adds_documents():
    small = {document for document in range(5_000) if split_of(digest(document), 3, 0.05) == "held_out"}
    large = {document for document in range(5_000) if split_of(digest(document), 3, 0.2) == "held_out"}
    assert small < large
