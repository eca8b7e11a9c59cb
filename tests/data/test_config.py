import re
from typing import Any

import pytest
from longring.data.config import CurriculumConfig, DataConfig, SourceConfig, TokenizerConfig


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"directory": ""}, ["data.directory"]),
        ({"min_bucket_tokens": 100}, ["data.min_bucket_tokens", "100", "powers of two"]),
        ({"max_bucket_tokens": 0}, ["data.max_bucket_tokens", "0"]),
        ({"min_bucket_tokens": 512, "max_bucket_tokens": 256}, ["data.min_bucket_tokens", "512", "256"]),
        ({"held_out_fraction": 1.0}, ["data.held_out_fraction", "1.0", r"[0, 1)"]),
        ({"held_out_fraction": -0.1}, ["data.held_out_fraction", "-0.1"]),
        ({"shard_tokens": 1_000}, ["data.shard_tokens", "1000", "data.max_bucket_tokens", "2048"]),
        ({"seed": -1}, ["data.seed", "-1"]),
    ],
)
def test_data_settings_out_of_range(settings: dict[str, Any], words: list[str]):
    with pytest.raises(ValueError, match=r"data\.") as error:
        DataConfig(**{"directory": "prepared", **settings})
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (SourceConfig, {"kind": "json"}, ["data.source.path", "data.source.kind", "'json'"]),
        (SourceConfig, {"kind": "python_stdlib", "path": "x"}, ["data.source.path", "'x'"]),
        (SourceConfig, {"limit_documents": -1}, ["data.source.limit_documents", "-1"]),
        (TokenizerConfig, {"vocab_size": 256}, ["data.tokenizer.vocab_size", "256", "257"]),
        (TokenizerConfig, {"boundary": ""}, ["data.tokenizer.boundary"]),
        (CurriculumConfig, {"cycles": 0}, ["curriculum.cycles", "0"]),
    ],
)
def test_nested_settings_out_of_range(make: Any, settings: dict[str, Any], words: list[str]):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        make(**settings)
    assert all(word in str(error.value) for word in words), error.value
