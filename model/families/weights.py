"""The weights of a published model by the names of transformers and by LongRing's, as one table for both directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .family import FAMILIES
from .read import PublishedModel


class Rows(NamedTuple):
    """Adjacent rows of a tensor of transformers."""

    name: str
    """Name of the tensor in safetensors files; empty: rows of zeros, which only pad."""
    first: int
    number: int


@dataclass(frozen=True)
class Weight:
    """One parameter of LongRing, and the tensors of transformers that it is made of."""

    ours: str
    """Name in `Transformer`."""
    theirs: dict[str, tuple[int, ...]]
    """Shapes of these tensors, by their names in safetensors files."""
    rows: tuple[Rows, ...]
    """Rows of theirs that follow one another in ours."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        [rest, *_] = (shape[1:] for shape in self.theirs.values())  # equal in all of them
        return (sum(rows.number for rows in self.rows), *rest)


def weights_of(model: PublishedModel) -> list[Weight]:
    """Return all weights of a model, from the embedding to the head; a tied head has none of its own."""
    config, norms, hidden = model.config, FAMILIES[model.family].norms, model.config.hidden_size
    q, kv = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
    q_norm, k_norm = (config.head_dim, config.head_dim) if config.qk_norm == "head" else (q, kv)
    inner = (config.ffn_hidden_size, hidden)  # of gate and of up
    found = [_vocabulary("embedding.weight", "model.embed_tokens.weight", model)]
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        heads = {f"{theirs}.self_attn.{name}_proj": size for name, size in (("q", q), ("k", kv), ("v", kv))}
        for kind, rest in (("weight", (hidden,)), ("bias", ())) if config.qkv_bias else (("weight", (hidden,)),):
            shapes = {f"{name}.{kind}": (size, *rest) for name, size in heads.items()}
            found.append(_by_kv_head(f"{ours}.attention.qkv.{kind}", shapes, config.num_kv_heads))
        same = {
            "mlp.gate_up": {"mlp.gate_proj": inner, "mlp.up_proj": inner},
            "attention_norm": {norms[0]: (hidden,)},
            "attention.out": {"self_attn.o_proj": (hidden, q)},
            "mlp_norm": {norms[1]: (hidden,)},
            "mlp.down": {"mlp.down_proj": inner[::-1]},
        }
        if config.qk_norm != "none":
            same |= {"attention.q_norm": {"self_attn.q_norm": (q_norm,)}}
            same |= {"attention.k_norm": {"self_attn.k_norm": (k_norm,)}}
        for name, others in same.items():
            shapes = {f"{theirs}.{other}.weight": shape for other, shape in others.items()}
            found.append(_stacked(f"{ours}.{name}.weight", shapes))
    found.append(_stacked("norm.weight", {"model.norm.weight": (hidden,)}))
    if not config.tied_head:
        found.append(_vocabulary("head.weight", "lm_head.weight", model))
    return found


def _stacked(ours: str, shapes: dict[str, tuple[int, ...]]) -> Weight:
    """Return a weight that holds tensors one below the other."""
    return Weight(ours, shapes, tuple(Rows(name, 0, shape[0]) for name, shape in shapes.items()))


def _vocabulary(ours: str, theirs: str, model: PublishedModel) -> Weight:
    """Return a weight with a row for each token, and rows of padding."""
    padding = model.config.padded_vocab_size(model.vocab_size) - model.vocab_size  # rows
    rows = (Rows(theirs, 0, model.vocab_size), *([Rows("", 0, padding)] if padding else []))
    return Weight(ours, {theirs: (model.vocab_size, model.config.hidden_size)}, rows)


def _by_kv_head(ours: str, shapes: dict[str, tuple[int, ...]], num_kv_heads: int) -> Weight:
    """Return a weight that holds, for each kv head, the rows of its queries, of its key and of its value."""
    counts = {name: shape[0] // num_kv_heads for name, shape in shapes.items()}  # rows of one kv head
    rows = [Rows(name, head * count, count) for head in range(num_kv_heads) for name, count in counts.items()]
    return Weight(ours, shapes, tuple(rows))


def to_theirs(weight: Weight, ours: Tensor) -> dict[str, Tensor]:
    """Return the tensors of transformers by name from LongRing's whole parameter, of which they may be views.

    `ours` has the shape `weight.shape`, the result the shapes `weight.theirs`.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in weight.theirs}
    for rows, part in zip(weight.rows, ours.split([rows.number for rows in weight.rows]), strict=True):
        if rows.name:
            parts[rows.name].append(part)  # in the order of the tensor
    return {name: torch.cat(found) if len(found) > 1 else found[0] for name, found in parts.items()}
