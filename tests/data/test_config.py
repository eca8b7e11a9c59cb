import re
from typing import Any

import pytest
from longring.data.config import CurriculumConfig, DataConfig, LoaderConfig, SourceConfig, TokenizerConfig


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
        ({"max_bad_fraction": 1.5}, ["data.max_bad_fraction", "1.5", "[0, 1]"]),
        ({"input_shard_bytes": 0}, ["data.input_shard_bytes", "0"]),
        ({"sources": {"a/b": SourceConfig()}}, ["data.sources.a/b", "letters"]),
        (
            {"source": SourceConfig(kind="json", path="x", tokens_field="ids")},
            ["data.tokenizer.path", "token ids"],
        ),
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
        (SourceConfig, {"kind": "text", "path": "x", "tokens_field": "ids"}, ["data.source.tokens_field", "'text'"]),
        (TokenizerConfig, {"training_characters": 0}, ["data.tokenizer.training_characters", "0"]),
        (CurriculumConfig, {"cycles": 0}, ["curriculum.cycles", "0"]),
        (CurriculumConfig, {"odds": ()}, ["curriculum.odds", "[]"]),
        (CurriculumConfig, {"odds": (1.0, 0.0)}, ["curriculum.odds", "[1.0, 0.0]"]),
        (CurriculumConfig, {"weights": {"web": -1.0}}, ["curriculum.weights.web", "-1.0"]),
        (LoaderConfig, {"workers": -1}, ["loader.workers", "-1"]),
        (LoaderConfig, {"prefetch_batches": 0}, ["loader.prefetch_batches", "0"]),
        (LoaderConfig, {"window_tokens": -1}, ["loader.window_tokens", "-1"]),
        (LoaderConfig, {"cache_bytes": 0}, ["loader.cache_bytes", "0"]),
    ],
)
def test_nested_settings_out_of_range(make: Any, settings: dict[str, Any], words: list[str]):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        make(**settings)
    assert all(word in str(error.value) for word in words), error.value


def test_two_ways_of_naming_sources_are_one_too_many():
    one = SourceConfig(kind="json", path="x")
    assert DataConfig(directory="x", source=one).named_sources == {"documents": one}
    assert DataConfig(directory="x", sources={"web": one}).named_sources == {"web": one}
    with pytest.raises(ValueError, match=r"data\.source and data\.sources are both set"):
        DataConfig(directory="x", source=one, sources={"web": one})
