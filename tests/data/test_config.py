"""Settings of data: each error names the key and the value, and its advice is carried out."""

import re
from typing import Any

import pytest
from longring.data.config import DataConfig, LoaderConfig, SourceConfig, TokenizerConfig
from longring.data.curriculum_config import CurriculumConfig, RenewalConfig

TOKENS = SourceConfig(kind="json", path="x", tokens_field="ids")
WEB = SourceConfig(kind="json", path="x")


@pytest.mark.parametrize(
    ("settings", "words", "advice"),
    [
        ({"directory": ""}, ["data.directory = ''"], {"directory": "here"}),
        (
            {"min_bucket_tokens": 100},
            ["data.min_bucket_tokens = 100: must be a power of two; set it to 64 or 128"],
            {"min_bucket_tokens": 64},
        ),
        (
            {"max_bucket_tokens": 3000},
            ["max_bucket_tokens = 3000", "set it to 2048 or 4096"],
            {"max_bucket_tokens": 4096},
        ),
        (
            {"min_bucket_tokens": 512, "max_bucket_tokens": 256},
            ["data.min_bucket_tokens = 512", "data.max_bucket_tokens = 256"],
            {"min_bucket_tokens": 256},
        ),
        (
            {"min_bucket_tokens": 512, "max_bucket_tokens": 256},
            ["lower the first or raise the second"],
            {"max_bucket_tokens": 512},
        ),
        (
            {"shard_tokens": 1_000},
            ["data.shard_tokens = 1000", "data.max_bucket_tokens = 2048"],
            {"shard_tokens": 2048},
        ),
        (
            {"source": SourceConfig(kind="megatron", path="x")},
            ["data.tokenizer.path = ''"],
            {"tokenizer": TokenizerConfig(path="t.json")},
        ),
        ({"source": TOKENS}, ["data.tokenizer.path = ''", "token ids"], {"tokenizer": TokenizerConfig(path="t.json")}),
        (
            {"source": WEB, "sources": {"books": WEB}},
            ["data.source.kind = 'json'", "data.sources is set as well"],
            {"source": SourceConfig(), "sources": {"books": WEB, "web": WEB}},
        ),
    ],
)
def test_data_settings_that_do_not_fit(settings: dict[str, Any], words: list[str], advice: dict[str, Any]):
    with pytest.raises(ValueError, match=r"data\.") as error:
        DataConfig(**{"directory": "prepared", **settings})
    assert all(word in str(error.value) for word in words), error.value
    DataConfig(**{"directory": "prepared", **settings, **advice})


@pytest.mark.parametrize(
    ("make", "settings", "words", "advice"),
    [
        (SourceConfig, {"kind": "json"}, ["data.source.path = ''", "data.source.kind", "'json'"], {"path": "a.jsonl"}),
        (SourceConfig, {"kind": "python_stdlib", "path": "x"}, ["data.source.path = 'x'"], {"path": ""}),
        (SourceConfig, {"kind": "python_stdlib", "path": "x"}, ["set data.source.kind"], {"kind": "text"}),
        (TokenizerConfig, {"vocab_size": 256}, ["data.tokenizer.vocab_size = 256", "257"], {"vocab_size": 257}),
        (
            TokenizerConfig,
            {"vocab_size": 257, "knot_chunks": 3},
            ["data.tokenizer.vocab_size = 257", "data.tokenizer.knot_chunks = 3", "266"],
            {"vocab_size": 266},
        ),
        (TokenizerConfig, {"knot_chunks": 1}, ["data.tokenizer.knot_chunks = 1"], {"knot_chunks": 0}),
        (TokenizerConfig, {"boundary": ""}, ["data.tokenizer.boundary = ''"], {"boundary": "<|endoftext|>"}),
        (
            SourceConfig,
            {"kind": "text", "path": "x", "tokens_field": "ids"},
            ["data.source.tokens_field = 'ids'", "'text'"],
            {"tokens_field": ""},
        ),
        (SourceConfig, {"path": "x", "tokens_field": "ids", "kind": "text"}, ["such as 'json'"], {"kind": "json"}),
        (
            SourceConfig,
            {"max_tokens": 9, "min_tokens": 10},
            ["data.source.max_tokens = 9", "leaves no document; raise it, or lower data.source.min_tokens"],
            {"min_tokens": 9},
        ),
        (
            SourceConfig,
            {"path": "x", "tokens_field": "ids", "kind": "tokens"},
            ["no fields with token ids"],
            {"tokens_field": ""},
        ),
        (
            SourceConfig,
            {"path": "x", "kind": "json", "eos": "</s>"},
            ["data.source.eos = '</s>'", "leave it out"],
            {"eos": ""},
        ),
        (
            SourceConfig,
            {"path": "x", "kind": "json", "record_holds": "stream"},
            ["data.source.record_holds = 'stream'", "or name the field of the ids in data.source.tokens_field"],
            {"tokens_field": "ids"},
        ),
        (
            SourceConfig,
            {"kind": "text", "path": "x", "score_field": "quality"},
            ["data.source.score_field = 'quality'", "or use a kind with fields, such as 'json', of one document each"],
            {"kind": "json"},
        ),
        (
            SourceConfig,
            {"kind": "json", "path": "x", "score_edges": (1.0, 2.0)},
            ["data.source.score_edges = [1.0, 2.0]", "name the field, and give the edges in ascending order"],
            {"score_field": "quality"},
        ),
        (
            SourceConfig,
            {"kind": "json", "path": "x", "score_field": "quality", "score_edges": (2.0, 1.0)},
            ["data.source.score_edges = [2.0, 1.0]"],
            {"score_edges": (1.0, 2.0)},
        ),
        (
            DataConfig,
            {"directory": "x", "sources": {"a.b": WEB}},
            ["data.sources.a.b: ", "is a score bin of the source NAME; rename it, as a-b"],
            {"sources": {"a-b": WEB}},
        ),
        (CurriculumConfig, {"odds": ()}, ["curriculum.odds = []"], {"odds": (1.0,)}),
    ],
)
def test_nested_settings_that_do_not_fit(make: Any, settings: dict[str, Any], words: list[str], advice: dict[str, Any]):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        make(**settings)
    assert all(word in str(error.value) for word in words), error.value
    make(**{**settings, **advice})


@pytest.mark.parametrize(
    ("make", "wrong", "message", "right"),
    [
        (CurriculumConfig, {"cycles": 0}, "CurriculumConfig.cycles = 0: must be at least 1 and at most 100000", 1),
        (CurriculumConfig, {"cycles": 2.5}, "CurriculumConfig.cycles = 2.5: must be of type int", 2),
        (CurriculumConfig, {"cycles": True}, "CurriculumConfig.cycles = True: must be of type int", 1),
        (CurriculumConfig, {"mix": "sentence"}, "CurriculumConfig.mix = 'sentence': must be one of 'step', ", "step"),
        (CurriculumConfig, {"odds": "grow"}, "CurriculumConfig.odds = 'grow': must be one of 'uniform', ", "grow_p2"),
        (CurriculumConfig, {"odds": (1.0, 0.0)}, "CurriculumConfig.odds[1] = 0.0: must be at least 1e-60", (1, 2)),
        (CurriculumConfig, {"shares": {"a": 1.5}}, "CurriculumConfig.shares['a'] = 1.5: must be", {"a": 0.5}),
        (
            CurriculumConfig,
            {"shares": {"a": ((0.5, float("nan")),)}},
            "CurriculumConfig.shares['a'][0][1] = nan: must be at least 0 and at most 1",
            {"a": ((0.5, 1.0),)},
        ),
        (
            CurriculumConfig,
            {"shares": {"a": ((0.5, 1.0, 2.0),)}},
            "CurriculumConfig.shares['a'][0] = (0.5, 1.0, 2.0): has 3 elements; give exactly 2 numbers",
            {"a": ((0.5, 1.0),)},
        ),
        (RenewalConfig, {"rate": -1.0}, "RenewalConfig.rate = -1.0: must be at least 0 and at most 100", 0.2),
        (RenewalConfig, {"graph": {"a": {"b": 2.0}}}, "RenewalConfig.graph['a']['b'] = 2.0: ", {"a": {"b": 1}}),
        (LoaderConfig, {"workers": -1}, "LoaderConfig.workers = -1: must be at least 0 and at most 1024", 0),
        (LoaderConfig, {"cache_bytes": 0}, "LoaderConfig.cache_bytes = 0: must be at least 1", 1),
    ],
)
def test_public_settings_hold_their_ranges(make: Any, wrong: dict[str, Any], message: str, right: Any):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**wrong)
    make(**dict.fromkeys(wrong, right))


def test_a_lone_source_has_a_name():
    assert DataConfig(directory="x", source=WEB).named_sources == {"documents": WEB}
    assert DataConfig(directory="x", sources={"web": WEB}).named_sources == {"web": WEB}
