"""LongRing's attention for the models of transformers, by the name "longring".

The values of a batch travel as keyword arguments of the model, which transformers hands down to its attention. So
nothing is patched, and nothing is global but the name.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from ..parallel.cp.shared import SharedSequence

NAME = "longring"
IGNORED = -100
"""The label that transformers leaves out of the loss."""


def register() -> None:
    """Make "longring" an attention implementation: `model.set_attn_implementation("longring")` then takes it."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, no_mask)


def model_inputs(
    sequence: SharedSequence, input_ids: Tensor, labels: Tensor | None = None, *, shift_labels: Tensor | None = None
) -> dict[str, Any]:
    """Return the arguments of a causal model for this rank's tokens of `input_ids` `[b, num_tokens]`.

    `labels` `[b, num_tokens]` are tokens as transformers takes them, which it would shift by one; `shift_labels` have
    been shifted. The loss of a rank is its sum over the labels of all ranks: the losses of the ranks add up to the
    mean, and so do their gradients.
    """
    if labels is not None:
        shift_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # the last token has no next one
    inputs: dict[str, Any] = {
        "input_ids": sequence.shard(input_ids),
        "position_ids": sequence.layout.positions(input_ids.device)[None],  # [1, s]
        "use_cache": False,
        "shared_sequence": sequence,
    }
    if shift_labels is None:
        return inputs
    own = sequence.shard(shift_labels)
    # Given `shift_labels`, transformers only looks whether there are `labels`.
    return {**inputs, "labels": own, "shift_labels": own, "num_items_in_batch": (shift_labels != IGNORED).sum()}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    shared_sequence: SharedSequence | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return attention `[b, s, h_q, d]` of query `[b, h_q, s, d]` over key, value `[b, h_kv, s, d]`. Collective.

    Attention is causal, within documents and attention windows. Raises ValueError if the model asks for anything else.
    """
    if shared_sequence is None:
        raise ValueError(
            "shared_sequence = None: the model was called without a sequence that ranks share; call it as "
            "model(**model_inputs(sequence, input_ids, labels))"
        )
    if not getattr(module, "is_causal", True):
        raise ValueError("is_causal = False: attention over a ring is causal; take a model whose attention is causal")
    extras = {"dropout": dropout or None, **{name: others.get(name) for name in ("softcap", "s_aux", "position_bias")}}
    for name, extra in extras.items():
        if extra is not None:
            raise ValueError(f"{name}: attention over a ring has none; take a model whose config asks for none")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [b, s, h, d]
    return shared_sequence.attention(q, k, v, window=sliding_window, scale=scaling), None


def no_mask(*, config: PreTrainedConfig, attention_mask: Tensor | None, use_vmap: bool, **_: Any) -> None:
    """Check, once for each forward pass, that the model needs nothing that the ring's sequence does not say.

    Raises ValueError for a mask, for a model that makes masks of its own, and for RoPE that depends on the largest
    position that a rank holds.
    """
    if attention_mask is not None:
        raise ValueError(
            "attention_mask: the shared sequence says which tokens see each other; leave the mask out, and give "
            "document_starts to ContextParallel.sequence"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    # One table for all layers, or one for each type of layers.
    kinds = {rope.get("rope_type"), *(one.get("rope_type") for one in rope.values() if isinstance(one, dict))}
    if use_vmap or getattr(config, "attention_chunk_size", None) or kinds & {"dynamic", "longrope"}:
        raise ValueError(
            f"model_type = {config.model_type!r}: chunked or two-way attention, and RoPE of type dynamic or longrope, "
            "would differ between the ranks of a ring; take a model without them"
        )
