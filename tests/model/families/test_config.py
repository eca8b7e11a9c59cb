"""config.json to `ModelConfig` and back, and what is refused, without transformers; test_parity.py has transformers."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from helpers.published import PUBLISHED, to_ours
from longring.model.config import ModelConfig, RopeScaling
from longring.model.families.family import FAMILIES
from longring.model.families.read import PublishedModel, read_config, shortest_pattern
from longring.model.families.weights import to_theirs, weights_of
from longring.model.families.write import family_of, write_config

SIZES: dict[str, Any] = {"num_layers": 8, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 48}
YARN = RopeScaling(kind="yarn", factor=8, original_tokens=8192)
WINDOWS = ("window", "window", "window", "full")
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": RopeScaling(kind="llama3", factor=8, original_tokens=8192), "tied_head": True},
    "mistral": {"layer_pattern": ("window",), "window_tokens": 4096, "head_dim": 16},
    "qwen2": {"qkv_bias": True, "rope_scaling": YARN},
    "qwen3": {"qk_norm": "head", "head_dim": 16},
    "olmo2": {"qk_norm": "projection", "norm_order": "after"},
    "olmo3": {
        **{"qk_norm": "projection", "norm_order": "after", "layer_pattern": WINDOWS, "window_tokens": 16},
        "rope_scaling": RopeScaling(kind="yarn", factor=8, original_tokens=8192, full_layers_only=True),
        "rope_base": 5e5,
    },
    "smollm3": {"layer_pattern": ("full", "full", "full", "full_no_rope"), "tied_head": True},
}
"""The least settings that only this family, or none before it, has."""


def published(family: str, **changes: Any) -> PublishedModel:
    config = ModelConfig(**SIZES, **CONFIGS[family])
    return PublishedModel(**{"family": family, "config": config, "vocab_size": 100, "max_tokens": 65_536, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_itself_after_writing_and_reading(family):
    model = published(family, other={"eos_token_id": [1, 2], "pad_token_id": None, "torch_dtype": "bfloat16"})
    back = read_config(json.loads(json.dumps(write_config(model))))
    assert back.config == model.config
    assert (back.family, back.vocab_size, back.max_tokens) == (family, 100, 65_536)
    assert {**model.other, "architectures": [FAMILIES[family].architecture], "model_type": family} == {
        key: value for key, value in back.other.items() if key != "max_window_layers"
    }
    assert family_of(model.config) == family


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_4_and_5_say_the_same_in_other_words(family):
    tree = write_config(published(family))
    four = {key: value for key, value in tree.items() if key != "rope_parameters"}
    five = {key: value for key, value in tree.items() if key not in ("rope_theta", "rope_scaling")}
    assert read_config(four).config == read_config(five).config == read_config(tree).config
    assert "rope_theta" in four
    assert "rope_theta" in json.dumps(five)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_first_windowed_layer_is_written_for_readers_without_layer_types(family):
    windows = {"layer_pattern": ("full",) * 5 + ("window",) * 3, "window_tokens": 16}
    config = ModelConfig(**{**SIZES, **CONFIGS[family], **windows})
    tree = write_config(published(family, config=config))
    assert read_config({key: value for key, value in tree.items() if key != "layer_types"}).config == config


def test_ntk_is_written_as_another_base_and_z_loss_not_at_all():
    model = published("llama")
    config = ModelConfig(**SIZES, rope_scaling=RopeScaling(kind="ntk", factor=4), rope_base=1e4, z_loss=1e-4)
    back = read_config(write_config(PublishedModel(**{**vars(model), "config": config}))).config
    assert back == ModelConfig(**SIZES, rope_base=1e4 * 4 ** (8 / 6))


def test_a_model_of_no_family_is_refused_with_its_settings():
    with pytest.raises(ValueError, match="has it with the other settings; train one of the families"):
        family_of(ModelConfig(**SIZES, norm_order="after", qk_norm="head"))
    assert family_of(ModelConfig(**SIZES, qk_norm="head")) == "qwen3"
    with pytest.raises(ValueError, match=r"model\.qkv_bias = True: llama has no such models; export as another family"):
        write_config(PublishedModel(**{**vars(published("qwen2")), "family": "llama"}))
    write_config(published("qwen2"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model(name):
    tree, num_parameters = PUBLISHED[name]
    model = read_config(tree)
    assert sum(torch.Size(shape).numel() for w in weights_of(model) for shape in w.theirs.values()) == num_parameters
    assert read_config(write_config(model)).config == model.config
    if name == "Llama 3.1 8B":
        assert model.config == ModelConfig(
            num_layers=32,
            hidden_size=4096,
            num_heads=32,
            num_kv_heads=8,
            ffn_hidden_size=14336,
            rope_base=5e5,
            rope_scaling=RopeScaling(kind="llama3", factor=8, original_tokens=8192),
        )
        assert model.config.head_dim == 128


def with_keys(family: str, **changes: Any) -> dict[str, Any]:
    """Return a config.json with other keys; ... removes one."""
    tree = {**write_config(published(family)), **changes}
    return {key: value for key, value in tree.items() if value is not ...}


YARN_KEYS = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
REFUSED = [
    (
        {"model_type": "gemma3"},
        {"model_type": "llama"},
        r"gemma3': has norms that multiply by 1 \+ weight.*; import a model of ",
    ),
    (
        {"model_type": "qwen3_moe"},
        {"model_type": "llama"},
        r"qwen3_moe': has a mixture of experts.*; import a model of ",
    ),
    (
        {"model_type": "phi3"},
        {"model_type": "llama"},
        r"phi3': is not a supported family; import a model of llama, mistral",
    ),
    (
        {"attention_bias": True},
        {"attention_bias": False},
        "attention_bias = True: only False is supported; import another",
    ),
    ({"hidden_act": "gelu"}, {"hidden_act": "silu"}, "hidden_act = 'gelu': only 'silu' is supported; import another"),
    ({"quantization_config": {"bits": 4}}, {"quantization_config": None}, "only None is supported"),
    (
        {"attn_scale": 2},
        {},
        "'attn_scale' = 2: unknown, and may change what the model computes; if it does not, remove",
    ),
    ({"hidden_size": ...}, {"hidden_size": 32}, "config.json: hidden_size: missing; add it"),
    ({"hidden_size": "32"}, {"hidden_size": 32}, "hidden_size = '32': must be of type int; correct it"),
    ({"vocab_size": 0}, {"vocab_size": 100}, r"vocab_size = 0: must be from 1 to \d+; correct it"),
    (
        {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": ...},
        {"rope_theta": 1e4},
        "rope_theta: missing, and transformers 4 and 5 differ in what it then is; add it",
    ),
    (
        {"rope_theta": 3e4},
        {"rope_theta": 1e5},
        "rope_parameters: differs from rope_theta and rope_scaling; remove one of them",
    ),
    (
        {"rope_parameters": {"rope_theta": 0}},
        {"rope_parameters": None},
        "rope_theta = 0.0: must be from 1 to 1000000000000.0; correct it",
    ),
    (
        {"rope_theta": ..., "rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_scaling": None},
        "rope_parameters: differs from rope_theta and rope_scaling; remove one of them",
    ),
    ({"rope_parameters": "yarn"}, {"rope_parameters": None}, "rope_parameters = 'yarn': must be a table; correct it"),
    (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2}},
        {"rope_parameters": None},
        "rope_type = 'dynamic': only default, linear, llama3, yarn are supported; import another model",
    ),
    (
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": None},
        "rope_scaling.factor: missing with rope_type linear",
    ),
    (
        {"rope_parameters": {"factor": 2, "rope_theta": 1e5}},
        {"rope_parameters": None},
        "unknown with rope_type default",
    ),
    (
        {"rope_parameters": {**YARN_KEYS, "attn_factor": 1}},
        {"rope_parameters": None},
        "attn_factor': unknown with rope_type yarn; remove it",
    ),
    (
        {"rope_parameters": {**YARN_KEYS, "beta_fast": "32"}},
        {"rope_parameters": None},
        "beta_fast = '32': must be of type float; correct it",
    ),
    (
        {"rope_parameters": {**YARN_KEYS, "partial_rotary_factor": 0.5}},
        {"rope_parameters": None},
        "partial_rotary_factor: only 1 is supported; import another model",
    ),
    (
        {"layer_types": ["sliding_attention"] * 8},
        {"layer_types": None},
        "has sliding_attention, which this family does not",
    ),
    (
        {"layer_types": ["chunked"] * 8},
        {"layer_types": None},
        "config.json: layer_types: must have 8 entries, full_attention or sliding_attention; correct it",
    ),
]


@pytest.mark.parametrize(("wrong", "right", "message"), REFUSED)
def test_what_is_not_exactly_supported_is_refused_with_its_key(wrong, right, message):
    plain = PublishedModel(family="llama", config=ModelConfig(**SIZES), vocab_size=100, max_tokens=4096)
    tree = {**write_config(plain), **wrong}
    with pytest.raises(ValueError, match=message):
        read_config({key: value for key, value in tree.items() if value is not ...})
    tree = {key: value for key, value in tree.items() if value is not ... and (right or key not in wrong)}
    read_config({**tree, **right})


OF_FAMILIES = [
    (
        "mistral",
        {"sliding_window": ...},
        {},
        "sliding_window: missing, and transformers then takes 4096; add it, null for none",
    ),
    (
        "olmo3",
        {"sliding_window": None},
        {"sliding_window": 16},
        "sliding_window = None: must be of type int; correct it",
    ),
    (
        *("olmo3", {"rope_parameters": YARN_KEYS}, {"rope_parameters": None}),
        "must have full_attention and sliding_attention, since transformers ignores others; nest them",
    ),
    (
        *("olmo3", {"rope_parameters": {"full_attention": YARN_KEYS, "sliding_attention": YARN_KEYS}}),
        {"rope_parameters": None},
        "sliding_attention: must have the rope_theta of full_attention and no scaling; import another model",
    ),
    (
        *("olmo3", {"rope_parameters": None, "rope_theta": 1e6}, {"rope_theta": 5e5}),
        "takes 500000 for those with a window; add rope_parameters, with full_attention and sliding_attention",
    ),
    (
        "olmo3",
        {"rope_parameters": None, "rope_scaling": {**YARN_KEYS, "rope_theta": 5e5, "truncate": False}},
        {"rope_scaling": None},
        "truncate = false: transformers ignores it in this family; remove it",
    ),
    ("smollm3", {"no_rope_layers": [1]}, {"no_rope_layers": None}, "no_rope_layers: must have 8 entries; correct it"),
    ("smollm3", {"use_sliding_window": True}, {"use_sliding_window": False}, "only False is supported"),
    ("qwen3", {"head_dim": ...}, {}, "head_dim: missing; add it"),
    ("mistral", {"num_key_value_heads": ...}, {}, "num_key_value_heads: missing; add it"),
]


@pytest.mark.parametrize(("family", "wrong", "right", "message"), OF_FAMILIES)
def test_what_a_family_lacks_is_refused_with_its_key(family, wrong, right, message):
    with pytest.raises(ValueError, match=message):
        read_config(with_keys(family, **wrong))
    read_config(with_keys(family, **({**wrong, **right} if right else {})))


def test_defaults_of_transformers_that_are_safe():
    tree = with_keys("smollm3", no_rope_layers=..., layer_types=..., tie_word_embeddings=..., num_key_value_heads=None)
    config = read_config(tree).config
    assert config.layer_pattern == ("full", "full", "full", "full_no_rope")
    assert config.tied_head
    assert config.num_kv_heads == config.num_heads
    assert read_config(with_keys("olmo3", layer_types=...)).config.layer_pattern == WINDOWS
    tree = with_keys("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=6, layer_types=...)
    assert read_config(tree).config.layer_pattern == ("full",) * 6 + ("window",) * 2
    assert read_config(with_keys("qwen2", use_sliding_window=False, sliding_window=64)).config.window_tokens == 0


ODD = (-1, 0, "x", [], {}, [[]], {"full_attention": 1}, math.inf, math.nan, True, 2**70, ["full_attention"] * 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_value_is_read_or_refused_in_one_line(family):
    tree = write_config(published(family))
    tables = [key for key, value in tree.items() if isinstance(value, dict)]
    trees = [{**tree, key: odd} for key in (*tree, "partial_rotary_factor") for odd in ODD]
    trees += [{**tree, key: {**tree[key], inner: odd}} for key in tables for inner in tree[key] for odd in ODD]
    for changed in trees:
        said = ""
        try:
            read_config(changed)
        except ValueError as error:
            said = str(error)
        assert "\n" not in said
        assert len(said) < 400


def test_the_lengths_of_yarn_have_its_factor_as_ratio():
    """transformers 4 takes their ratio for the factor."""
    model = PublishedModel(
        family="qwen2", config=ModelConfig(**SIZES, qkv_bias=True, rope_scaling=YARN), vocab_size=100, max_tokens=4096
    )
    assert write_config(model)["max_position_embeddings"] == 8 * 8192


def test_yarn_with_all_its_fields():
    table = {**YARN_KEYS, "beta_fast": 16, "beta_slow": 2, "truncate": False, "mscale": 2.0, "mscale_all_dim": 1.0}
    scaling = read_config(
        with_keys("qwen2", rope_parameters=table, rope_theta=..., rope_scaling=...)
    ).config.rope_scaling
    assert scaling == RopeScaling(
        kind="yarn",
        factor=4,
        original_tokens=32768,
        beta_fast=16,
        beta_slow=2,
        truncate=False,
        attention_factor=scaling.attention_factor,
    )
    assert scaling.attention_factor == pytest.approx((0.2 * 1.3862943611 + 1) / (0.1 * 1.3862943611 + 1))


@pytest.mark.parametrize(
    ("kinds", "pattern"),
    [("wwwfwwwf", "wwwf"), ("wwwfw", "wwwf"), ("ffff", "f"), ("fw", "fw"), ("wwwfwf", "wwwfwf"), ("wwwff", "wwwff")],
)
def test_the_pattern_is_the_shortest_that_repeats(kinds, pattern):
    assert shortest_pattern(list(kinds)) == tuple(pattern)


@pytest.mark.parametrize(
    ("layers", "pattern", "read", "family"),
    [
        (2, ("full", "full"), ("full",), "llama"),
        (3, ("full", "full"), ("full",), "llama"),
        (8, (*WINDOWS, *WINDOWS), WINDOWS, "olmo3"),
        (1, ("full", "window"), ("full",), "llama"),
    ],
    ids=str,
)
def test_a_pattern_that_is_not_the_shortest_is_written_as_that(layers, pattern, read, family):
    settings = {**SIZES, **CONFIGS[family], "num_layers": layers, "layer_pattern": pattern}
    config = ModelConfig(**{**settings, "window_tokens": 16 if "window" in pattern else 0})
    assert family_of(config) == family
    found = read_config(write_config(published(family, config=config))).config
    assert found.layer_pattern == read
    assert found.window_tokens == (16 if "window" in read else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_themselves_after_a_way_there_and_back(family):
    model = published(family)
    generator = torch.Generator().manual_seed(0)
    seen: set[str] = set()
    for weight in weights_of(model):
        theirs = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in weight.theirs.items()}
        ours = to_ours(weight, theirs)
        back = to_theirs(weight, ours)
        assert ours.shape == weight.shape
        assert back.keys() == theirs.keys()
        assert all(torch.equal(back[name], theirs[name]) for name in theirs), weight
        assert not seen & set(weight.theirs)
        seen |= set(weight.theirs)
