"""The families of published models that `ModelConfig` describes exactly, as one table of data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Family:
    """A `model_type` of transformers: settings that all its models share, and keys of config.json with the rest."""

    architecture: str
    """Class of transformers that loads the model."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `ModelConfig` that its models have whatever config.json says."""
    layers_key: Literal["", "sliding_window", "use_sliding_window", "layer_types", "no_rope_layers"] = ""
    """Key of config.json that decides the kinds of the layers; without one all layers are full."""
    tied_by_default: bool = False
    """Value of tie_word_embeddings where config.json has none."""
    bias_keys: tuple[str, ...] = ("attention_bias",)
    """Keys of config.json that must be false."""
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    """Names of the norms of attention and of SwiGLU."""


_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
_OLMO = {"qk_norm": "projection", "norm_order": "after"}

FAMILIES: dict[str, Family] = {
    "llama": Family(architecture="LlamaForCausalLM", bias_keys=("attention_bias", "mlp_bias")),
    "mistral": Family(architecture="MistralForCausalLM", layers_key="sliding_window", bias_keys=()),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM", settings={"qkv_bias": True}, layers_key="use_sliding_window", bias_keys=()
    ),
    "qwen3": Family(architecture="Qwen3ForCausalLM", settings={"qk_norm": "head"}, layers_key="use_sliding_window"),
    "olmo2": Family(architecture="Olmo2ForCausalLM", settings=_OLMO, norms=_AFTER),
    "olmo3": Family(architecture="Olmo3ForCausalLM", settings=_OLMO, norms=_AFTER, layers_key="layer_types"),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        layers_key="no_rope_layers",
        tied_by_default=True,
        bias_keys=("attention_bias", "mlp_bias"),
    ),
}
"""Families by `model_type`."""

_MOE = "has a mixture of experts, and LongRing trains dense models"
_GEMMA = "has norms that multiply by 1 + weight, scaled embeddings and GELU"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma4"), _GEMMA),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "gpt_oss", "llama4"), _MOE),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "granitemoe", "phimoe", "glm4_moe", "minimax", "dbrx"), _MOE),
    "ministral3": "scales queries by position",
    "mistral3": "is a vision model around another one",
}
"""Reasons why well-known families are refused, by `model_type`."""

SCALINGS: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_tokens",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_tokens",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "attention_factor": "attention_factor",
    },
}
"""Settings of `RopeScaling` by the keys of transformers, by `rope_type`; the type "default" is the kind "none"."""

SIZES: dict[str, str] = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "ffn_hidden_size",
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tied_head",
    "initializer_range": "init_std",
}
"""Settings of `ModelConfig` by the keys of transformers that say the same."""

_IGNORED = """
    architectures model_type torch_dtype dtype transformers_version use_cache bos_token_id eos_token_id pad_token_id
    _name_or_path id2label label2id output_attentions output_hidden_states return_dict return_dict_in_generate
    chunk_size_feed_forward is_decoder problem_type torchscript pretraining_tp no_rope_layer_interval max_window_layers
    unk_token_id sep_token_id attn_implementation _attn_implementation_autoset
"""
IGNORED = frozenset(_IGNORED.split())
"""Keys of config.json that change nothing in training; they are kept as they are."""

FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_dropout": 0,
    "partial_rotary_factor": 1,
    "quantization_config": None,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}
"""Values that keys of config.json must have where they are present."""
