"""Hugging Face directories with random weights, and config.json of published models of every family."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from longring.model.families.read import PublishedModel
from longring.model.families.weights import Weight, weights_of
from longring.model.families.write import write_config
from safetensors.torch import save_file
from torch import Tensor

_YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "beta_fast": 32, "beta_slow": 1}
_COMMON = {"hidden_act": "silu", "attention_dropout": 0.0, "tie_word_embeddings": False}
_COMMON |= {"initializer_range": 0.02, "rms_norm_eps": 1e-6, "use_cache": True, "torch_dtype": "bfloat16"}
_NO_BIAS = {"attention_bias": False}
_LLAMA_3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA_3 |= {"original_max_position_embeddings": 8192}
_LLAMA = {"bos_token_id": 128000, "eos_token_id": 128001, "mlp_bias": False, "pretraining_tp": 1, "rms_norm_eps": 1e-5}
_LLAMA |= {"rope_theta": 5e5, "vocab_size": 128256, "max_position_embeddings": 131072}
_QWEN = {"sliding_window": None, "use_sliding_window": False, "bos_token_id": 151643, "rope_scaling": None}


def _sizes(layers: int, hidden: int, heads: int, kv_heads: int, inner: int) -> dict[str, int]:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner}
    return {**sizes, "num_attention_heads": heads, "num_key_value_heads": kv_heads}


PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama 3.1 8B": (
        {
            **_COMMON,
            **_NO_BIAS,
            **_LLAMA,
            **_sizes(32, 4096, 32, 8, 14336),
            "model_type": "llama",
            "rope_scaling": {**_LLAMA_3, "factor": 8.0},
        },
        8_030_261_248,
    ),
    "Llama 3.2 1B": (
        {
            **_COMMON,
            **_NO_BIAS,
            **_LLAMA,
            **_sizes(16, 2048, 32, 8, 8192),
            **{"model_type": "llama", "head_dim": 64, "tie_word_embeddings": True},
            "rope_scaling": {**_LLAMA_3, "factor": 32.0},
        },
        1_235_814_400,
    ),
    "Mistral 7B v0.3": (
        {
            **_COMMON,
            **_sizes(32, 4096, 32, 8, 14336),
            **{"model_type": "mistral", "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None},
            **{"vocab_size": 32768, "max_position_embeddings": 32768, "bos_token_id": 1, "eos_token_id": 2},
        },
        7_248_023_552,
    ),
    "Qwen 2.5 7B": (
        {
            **_COMMON,
            **_QWEN,
            **_sizes(28, 3584, 28, 4, 18944),
            **{"model_type": "qwen2", "rope_theta": 1e6, "vocab_size": 152064, "max_position_embeddings": 131072},
            **{"sliding_window": 131072, "max_window_layers": 28},
        },
        7_615_616_512,
    ),
    "Qwen 3 8B": (
        {
            **_COMMON,
            **_NO_BIAS,
            **_QWEN,
            **_sizes(36, 4096, 32, 8, 12288),
            **{
                "model_type": "qwen3",
                "rope_theta": 1e6,
                "vocab_size": 151936,
                "max_position_embeddings": 32768,
            },
            **{"head_dim": 128, "max_window_layers": 36},
        },
        8_190_735_360,
    ),
    "OLMo 2 7B": (
        {
            **_COMMON,
            **_NO_BIAS,
            **_sizes(32, 4096, 32, 32, 11008),
            **{
                "model_type": "olmo2",
                "rope_theta": 5e5,
                "rope_scaling": None,
                "vocab_size": 100352,
            },
            **{"max_position_embeddings": 4096, "pad_token_id": 100277, "eos_token_id": 100257},
        },
        7_298_617_344,
    ),
    "OLMo 3 7B": (
        {
            **_COMMON,
            **_NO_BIAS,
            **_sizes(32, 4096, 32, 32, 11008),
            **{
                "model_type": "olmo3",
                "rope_theta": 5e5,
                "vocab_size": 100278,
                "max_position_embeddings": 65536,
            },
            **{"sliding_window": 4096, "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8},
            **{"pad_token_id": 100277, "eos_token_id": 100257},
            "rope_scaling": {**_YARN, "attention_factor": 1.2079441541679836},
        },
        7_298_011_136,
    ),
    "SmolLM 3 3B": (
        {
            **_COMMON,
            **_NO_BIAS,
            **_sizes(36, 2048, 16, 4, 11008),
            **{
                "model_type": "smollm3",
                "rope_theta": 5e6,
                "rope_scaling": None,
                "vocab_size": 128256,
            },
            **{"tie_word_embeddings": True, "max_position_embeddings": 65536, "mlp_bias": False},
            **{"no_rope_layers": [1, 1, 1, 0] * 9, "no_rope_layer_interval": 4, "use_sliding_window": False},
            **{"layer_types": ["full_attention"] * 36, "sliding_window": None, "pretraining_tp": 2},
        },
        3_075_098_624,
    ),
}
"""config.json in the words of transformers 4, and number of parameters, of a published model of each family."""


def scaled_down(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json of 4 layers, 100 tokens and small widths with all other keys and ratios of a published one.

    Lengths are divided by 256, so that sequences of 64 tokens are beyond an original context of 8,192.
    """
    heads, kv_heads = tree["num_attention_heads"], tree["num_key_value_heads"]
    kv_heads, heads = (1, heads // kv_heads) if heads > kv_heads else (4, 4)
    head_dim = tree["hidden_size"] // tree["num_attention_heads"] // 8
    small = {**tree, **_sizes(4, heads * head_dim, heads, kv_heads, tree["intermediate_size"] // 128)}
    small |= {"vocab_size": 100, "max_position_embeddings": max(16, tree["max_position_embeddings"] // 256)}
    small |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    small |= {key: tree[key][:4] for key in ("layer_types", "no_rope_layers") if key in tree}
    if "head_dim" in tree:
        small["head_dim"] = tree["head_dim"] // 8
    if tree.get("sliding_window"):
        small["sliding_window"] = tree["sliding_window"] // 256
    if tree.get("rope_scaling"):
        small["rope_scaling"] = {**tree["rope_scaling"], "original_max_position_embeddings": 32}
    return small


def write_model(directory: Path, model: PublishedModel, num_files: int = 1) -> dict[str, Tensor]:
    """Write config.json and random weights, norms in fp32 and all others in bf16; return the tensors by name."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for weight in weights_of(model):
        for name, shape in weight.theirs.items():
            values = torch.randn(shape, generator=generator)
            tensors[name] = values if "norm" in name else values.bfloat16()
    (directory / "config.json").write_text(json.dumps(write_config(model), indent=2))
    files: dict[str, dict[str, Tensor]] = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        file = "model.safetensors" if num_files == 1 else f"model-{number % num_files:05d}.safetensors"
        files.setdefault(file, {})[name] = tensor
    for file, part in files.items():
        save_file(part, directory / file, metadata={"format": "pt"})
    if num_files > 1:
        index = {"weight_map": {name: file for file, part in files.items() for name in part}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def to_ours(weight: Weight, theirs: Mapping[str, Tensor]) -> Tensor:
    """Return LongRing's parameter, whole, from tensors of transformers by name."""
    some = theirs[next(iter(weight.theirs))]
    return torch.cat(
        [
            theirs[name][first : first + number] if name else some.new_zeros(number, *some.shape[1:])
            for name, first, number in weight.rows
        ]
    )
