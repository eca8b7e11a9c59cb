"""Spans of long texts: together they have the text, and the ids of the whole where a cut is exact."""

from collections.abc import Callable

import pytest
from helpers.tokenizers import CORPUS, MAKE, byte_level
from hypothesis import given, settings
from hypothesis import strategies as st
from longring.data.format import spans as module
from longring.data.format.spans import Span, breaks, spans
from tokenizers import Tokenizer

LIMIT = 24
TEXTS = st.lists(
    st.sampled_from(
        [" ", "  ", "\n", "\r\n", ";\n\n", "the", "ring", "returns", "x", "12345", "----", "世界", "e\u0301"]
    )
    | st.text(max_size=5)
    | st.integers(20, 90).map(lambda count: "a" * count)
    | st.integers(20, 90).map(lambda count: " " * count),
    max_size=40,
).map("".join)


@pytest.fixture(scope="module", params=MAKE, ids=lambda make: make.__name__)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.param()


def encode_with(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def ids_of(found: list[Span], encode: Callable[[str], list[int]]) -> list[int]:
    ids = []
    for span in found:
        with_context = encode(span.context + span.text)
        assert with_context[: len(span.context_ids)] == span.context_ids
        ids += with_context[len(span.context_ids) :]
    return ids


@settings(max_examples=60)
@given(text=TEXTS)
def test_pieces_have_the_ids_of_the_whole_where_every_cut_is_exact(tokenizer: Tokenizer, text: str):
    encode = encode_with(tokenizer)
    found = list(spans(text, encode, LIMIT))
    assert "".join(span.text for span in found) == text
    assert all(len(span.text) <= LIMIT for span in found)
    assert [span.start for span in found] == [sum(len(p.text) for p in found[:i]) for i in range(len(found))]
    if not any(span.in_word for span in found):
        assert ids_of(found, encode) == encode(text)


def test_ordinary_text_has_no_cut_in_a_word(tokenizer: Tokenizer):
    """Text without a word as long as a span: every cut is before white space, and exact."""
    text = "".join(CORPUS * 3)
    found = list(spans(text, encode_with(tokenizer), 64))
    assert len(found) > 20
    assert not any(span.in_word for span in found)
    assert ids_of(found, encode_with(tokenizer)) == encode_with(tokenizer)(text)


@settings(max_examples=60)
@given(text=TEXTS)
def test_byte_level_is_exact_before_white_space_whatever_the_context(text: str):
    """No pattern of ByteLevel joins a word to the white space after it, so three characters of context suffice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CONTEXT_CHARACTERS", 3)
        found = list(spans(text, encode_with(byte_level()), LIMIT))
    if not any(span.in_word for span in found):
        assert ids_of(found, encode_with(byte_level())) == encode_with(byte_level())(text)


@settings(max_examples=60)
@given(text=TEXTS)
def test_no_character_is_lost_at_a_cut_in_a_word(text: str):
    tokenizer = byte_level()
    found = list(spans(text, encode_with(tokenizer), 7))
    ids = [
        number for span in found for number in tokenizer.encode(span.context + span.text).ids[len(span.context_ids) :]
    ]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", ["a" * 100, " " * 100, "ab" * 50])
def test_a_cut_in_a_long_word_is_told(text: str):
    found = list(spans(text, encode_with(byte_level()), LIMIT))
    assert [span.in_word for span in found] == [False] + [True] * (len(found) - 1)
    assert len(found) >= 4


def test_a_tokenizer_that_joins_everything_is_cut_and_told():
    """A vocabulary of one long token: no cut is exact, and no context is taken."""
    text = "ab " * 40
    found = list(spans(text, lambda part: [len(part)], LIMIT))
    assert [span.context for span in found] == [""] * len(found)
    assert all(span.in_word for span in found[1:])
    assert "".join(span.text for span in found) == text


@given(text=TEXTS, start=st.integers(0, 50), length=st.integers(0, 300))
def test_breaks_are_before_white_space_and_the_last_first(text: str, start: int, length: int):
    stop = min(start + length, len(text))
    expected = [
        position
        for position in range(stop, start, -1)
        if position < len(text) and text[position].isspace() and not text[position - 1].isspace()
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TAIL_CHARACTERS", 10)
        assert list(breaks(text, start, stop)) == expected
