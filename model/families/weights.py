"""The weights of a published model by the names of transformers and by LongRing's, as one table for both directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .family import FAMILIES
from .read import PublishedModel


@dataclass(frozen=True)
class Weight:
    """One parameter of LongRing, and the tensors of transformers that it is made of."""

    ours: str
    """Name in `Transformer`."""
    theirs: dict[str, tuple[int, ...]]
    """Shapes of these tensors, by their names in safetensors files."""
    layout: Literal["same", "vocabulary", "stacked", "by_kv_head"]
    """Way from theirs to ours: same takes one as it is; vocabulary pads its rows with zeros; stacked lays them one
    below the other; by_kv_head orders the rows of q, k and v by kv head, each with its queries first."""


def weights_of(model: PublishedModel) -> list[Weight]:
    """Return all weights of a model, from the embedding to the head; a tied head has none of its own."""
    config, norms, hidden = model.config, FAMILIES[model.family].norms, model.config.hidden_size
    q, kv = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
    q_norm, k_norm = (config.head_dim, config.head_dim) if config.qk_norm == "head" else (q, kv)
    inner, rows = (config.ffn_hidden_size, hidden), (model.vocab_size, hidden)
    found = [Weight("embedding.weight", {"model.embed_tokens.weight": rows}, "vocabulary")]
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        heads = {f"{theirs}.self_attn.{name}_proj": size for name, size in (("q", q), ("k", kv), ("v", kv))}
        qkv = {f"{name}.weight": (size, hidden) for name, size in heads.items()}
        found.append(Weight(f"{ours}.attention.qkv.weight", qkv, "by_kv_head"))
        if config.qkv_bias:
            bias = {f"{name}.bias": (size,) for name, size in heads.items()}
            found.append(Weight(f"{ours}.attention.qkv.bias", bias, "by_kv_head"))
        gate_up = {f"{theirs}.mlp.{name}_proj.weight": inner for name in ("gate", "up")}
        found.append(Weight(f"{ours}.mlp.gate_up.weight", gate_up, "stacked"))
        same = {
            "attention_norm": (norms[0], (hidden,)),
            "attention.out": ("self_attn.o_proj", (hidden, q)),
            "mlp_norm": (norms[1], (hidden,)),
            "mlp.down": ("mlp.down_proj", inner[::-1]),
        }
        if config.qk_norm != "none":
            same |= {"attention.q_norm": ("self_attn.q_norm", (q_norm,))}
            same |= {"attention.k_norm": ("self_attn.k_norm", (k_norm,))}
        for name, (other, shape) in same.items():
            found.append(Weight(f"{ours}.{name}.weight", {f"{theirs}.{other}.weight": shape}, "same"))
    found.append(Weight("norm.weight", {"model.norm.weight": (hidden,)}, "same"))
    if not config.tied_head:
        found.append(Weight("head.weight", {"lm_head.weight": rows}, "vocabulary"))
    return found


def to_ours(weight: Weight, tensors: Sequence[Tensor], model: PublishedModel) -> Tensor:
    """Return LongRing's parameter, whole, from the tensors of transformers in the order of `weight.theirs`."""
    match weight.layout:
        case "vocabulary":
            [rows] = tensors
            padding = model.config.padded_vocab_size(model.vocab_size) - model.vocab_size
            return torch.cat([rows, rows.new_zeros(padding, *rows.shape[1:])]) if padding else rows
        case "stacked":
            return torch.cat(list(tensors))
        case "by_kv_head":
            # [h * d, ...] -> [h_kv, h / h_kv, d, ...], joined along the heads of one kv head
            config = model.config
            parts = [x.unflatten(0, (config.num_kv_heads, -1, config.head_dim)) for x in tensors]
            return torch.cat(parts, dim=1).flatten(0, 2)
    [same] = tensors
    return same


def to_theirs(weight: Weight, ours: Tensor, model: PublishedModel) -> list[Tensor]:
    """Return the tensors of transformers, in the order of `weight.theirs`, from LongRing's whole parameter."""
    match weight.layout:
        case "vocabulary":
            return [ours[: model.vocab_size]]
        case "stacked":
            return list(ours.chunk(len(weight.theirs)))
        case "by_kv_head":
            config = model.config
            heads = ours.unflatten(0, (config.num_kv_heads, -1, config.head_dim))  # [h_kv, queries + 2, d, ...]
            return [part.flatten(0, 2) for part in heads.split([heads.shape[1] - 2, 1, 1], dim=1)]
    return [ours]
