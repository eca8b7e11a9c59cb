"""Spans of long texts: together they have the text, and the ids of the whole where a cut is exact."""

from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from longring.data.config import TokenizerConfig
from longring.data.format import spans as module
from longring.data.format.spans import Span, breaks, spans
from longring.data.prepare.train_tokenizer import train_tokenizer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

LIMIT = 24
CORPUS = ["the ring; turns,\n\n  the ring returns\n", "if x == 12345:\r\n\treturn {a: b};\n", "----  ==== 世界"] * 9
CL100K = "|".join([
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
])  # fmt: skip


@cache
def byte_level() -> Tokenizer:
    return Tokenizer.from_buffer(train_tokenizer(CORPUS, TokenizerConfig(vocab_size=330)))


def trained(prefix: object | None, normalizer: object | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="?"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, prefix  # type: ignore[assignment]
    alphabet = [chr(number) for number in range(32, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["?"], initial_alphabet=alphabet, show_progress=False, max_token_length=8
    )
    tokenizer.train_from_iterator(CORPUS, trainer=trainer)
    return tokenizer


def like_cl100k() -> Tokenizer:
    split = pre_tokenizers.Split(Regex(CL100K), "isolated")
    return trained(pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]))


def like_llama_2() -> Tokenizer:
    """No pre-tokenizer; every text gets a leading space, and merges go over spaces."""
    return trained(None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]))


def with_prefix_space() -> Tokenizer:
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=True))


def stripped() -> Tokenizer:
    return trained(pre_tokenizers.Metaspace(), normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()]))


def word_pieces() -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate(["?", "the", "##s", "ring", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="?", max_input_chars_per_word=9))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    return tokenizer


MAKE: list[Callable[[], Tokenizer]] = [
    byte_level, like_cl100k, like_llama_2, with_prefix_space, stripped, word_pieces
]  # fmt: skip
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
