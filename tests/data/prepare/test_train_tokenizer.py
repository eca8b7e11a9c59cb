"""The tokenizer of a preparation: trained to the same bytes, or read from a file or a directory."""

from pathlib import Path

import numpy as np
import pytest
from longring.data.config import TokenizerConfig
from longring.data.format.tokenizer import DocumentTokenizer
from longring.data.prepare.train_tokenizer import read_tokenizer, train_tokenizer

END = "<|endoftext|>"
TEXTS = ["the ring turns, the ring returns", "Grüße, 世界 \U0001f44b\n\ttabs", "x = 1  # two spaces\r\n"]


@pytest.fixture(scope="module")
def content() -> bytes:
    return train_tokenizer(TEXTS * 3, TokenizerConfig(vocab_size=280))


def test_training_is_deterministic_and_has_the_asked_size(content: bytes):
    assert content == train_tokenizer(iter(TEXTS * 3), TokenizerConfig(vocab_size=280))
    assert DocumentTokenizer(content, END).vocab_size == 280
    assert DocumentTokenizer(content, END).dtype == np.uint16


def test_read_takes_the_file_or_its_directory(tmp_path: Path, content: bytes):
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert read_tokenizer(str(tmp_path)) == read_tokenizer(str(tmp_path / "tokenizer.json")) == content


@pytest.mark.parametrize("name", ["", "other.json"])
def test_missing_file(tmp_path: Path, name: str):
    with pytest.raises(ValueError, match=r"data\.tokenizer\.path = .*json does not exist") as error:
        read_tokenizer(str(tmp_path / name))
    assert str(tmp_path) in str(error.value)
