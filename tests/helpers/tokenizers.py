"""Small tokenizers of the kinds that exist: byte level, splitting by a pattern, with prefix spaces, word pieces."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from longring.data.config import TokenizerConfig
from longring.data.prepare.train_tokenizer import train_tokenizer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

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
