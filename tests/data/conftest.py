import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from longring.data.config import DataConfig, SourceConfig, TokenizerConfig
from longring.data.prepare.train_tokenizer import train_tokenizer
from rich.console import Console

WORDS = "the ring turns a token home while every rank keeps its own keys and values in place 0123456789 äöü"


@pytest.fixture(scope="session", autouse=True)
def _no_flushing():
    """Replace fsync, for which hundreds of tiny shards would wait some milliseconds each; no test loses power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def words() -> Callable[..., str]:
    return _words


def _words(count: int, start: int = 0) -> str:
    """Return a text of `count` words with few repetitions; another `start` gives another text."""
    choices = WORDS.split()
    return " ".join(choices[(start + 7 * index * index) % len(choices)] for index in range(count))


@pytest.fixture
def console() -> Console:
    return Console(width=100, quiet=True)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 300 tokens, trained once."""
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    file.write_bytes(train_tokenizer([_words(500)], TokenizerConfig(vocab_size=300)))
    return file


@pytest.fixture
def make_config(tmp_path: Path, tokenizer_file: Path) -> Callable[..., DataConfig]:
    """Return a function that writes documents to tmp_path as JSON lines and returns their settings; keywords replace
    settings."""

    def make(texts: list[str], **settings: Any) -> DataConfig:
        source = tmp_path / "documents.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        defaults: dict[str, Any] = {
            "directory": str(tmp_path / "prepared"),
            "source": SourceConfig(kind="json", path=str(source)),
            "tokenizer": TokenizerConfig(path=str(tokenizer_file)),
            "min_bucket_tokens": 8,
            "max_bucket_tokens": 32,
            "held_out_fraction": 0.3,
            "max_bad_fraction": 1.0,
            "shard_tokens": 512,
        }
        return DataConfig(**{**defaults, **settings})

    return make
