import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from longring.data.decompose import bucket_lengths, decompose, split_of


def test_bucket_lengths_are_the_powers_of_two_in_between():
    assert bucket_lengths(128, 1024) == (128, 256, 512, 1024)
    assert bucket_lengths(8, 8) == (8,)


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
    """Dynamic programming over every way to cut exactly `pairs` pairs: knows nothing of binary digits."""
    best = [0] + [10**9] * pairs
    for total in range(1, pairs + 1):
        best[total] = min((best[total - length] + 1 for length in lengths if length <= total), default=10**9)
    return best[pairs]


@settings(deadline=None)
@given(st.integers(0, 700), st.integers(0, 4), st.integers(0, 4))
def test_the_cut_is_adjacent_falling_and_the_coarsest(pairs: int, smallest: int, more: int):
    lengths = bucket_lengths(1 << smallest, 1 << (smallest + more))
    pieces = decompose(pairs, lengths)
    covered = [place for offset, length in pieces for place in range(offset, offset + length)]
    assert covered == list(range(pairs - pairs % lengths[0]))
    assert [piece.length for piece in pieces] == sorted((piece.length for piece in pieces), reverse=True)
    assert len(pieces) == smallest_number_of_pieces(len(covered), lengths)


def test_split_is_a_pure_function_with_the_asked_fraction():
    first = [split_of(document, 7, 0.1) for document in range(20_000)]
    assert first[:100] == [split_of(document, 7, 0.1) for document in range(100)]
    # Binomial: 2,000 expected, standard deviation 42.
    assert 1_800 < first.count("held_out") < 2_200
    assert first != [split_of(document, 8, 0.1) for document in range(20_000)]
    assert {split_of(document, 7, 0.0) for document in range(1_000)} == {"train"}


def test_a_larger_fraction_only_adds_documents():
    small = {document for document in range(5_000) if split_of(document, 3, 0.05) == "held_out"}
    large = {document for document in range(5_000) if split_of(document, 3, 0.2) == "held_out"}
    assert small < large
