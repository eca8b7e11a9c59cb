# pyright: reportMissingImports=false
"""A training step of the models of other trainers, for `train_step.py --peers`, where these are installed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from longring.model.families.write import write_config
from torch import Tensor, nn

from .step_members import Case, Step, torch_step


def olmo_core(case: Case) -> Step:
    """Return the step of OLMo-core's Llama and loss with torch's attention and fused AdamW."""
    from olmo_core.nn.attention import AttentionBackendName
    from olmo_core.nn.feed_forward import FeedForwardConfig
    from olmo_core.nn.hf.convert import convert_state_from_hf
    from olmo_core.nn.transformer import TransformerConfig
    from transformers import LlamaConfig

    m, tree = case.model, write_config(case.published)
    config = TransformerConfig.llama_like(
        d_model=m.hidden_size,
        vocab_size=case.vocab_size,
        n_layers=m.num_layers,
        n_heads=m.num_heads,
        n_kv_heads=m.num_kv_heads,
        rope_theta=int(m.rope_base),
        layer_norm_eps=m.norm_epsilon,
        attn_backend=AttentionBackendName.torch,
        feed_forward=FeedForwardConfig(hidden_size=m.ffn_hidden_size, bias=False),
    )
    model = config.build(init_device="cpu")
    model.load_state_dict(convert_state_from_hf(LlamaConfig(**tree), case.weights(), model_type="llama"))
    return torch_step(case, model, lambda m, tokens, targets: m(tokens, labels=targets).loss)


def torchtitan(case: Case) -> Step:
    """Return the step of torchtitan's Llama 3 with its flex attention, the one that needs no GPU by its documents."""
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.llama3 import Llama3Model, Llama3StateDictAdapter, _build_llama3_layers

    m = case.model
    rope = ComplexRoPE.Config(dim=m.head_dim, max_seq_len=case.tokens, theta=m.rope_base)
    shape: dict[str, Any] = {"dim": m.hidden_size, "n_heads": m.num_heads, "n_kv_heads": m.num_kv_heads}
    layers = _build_llama3_layers(
        **shape,
        n_layers=m.num_layers,
        hidden_dim=m.ffn_hidden_size,
        rope=rope,
        fuse_qkv=False,
        attn_backend="flex",
    )
    config = Llama3Model.Config(
        dim=m.hidden_size,
        vocab_size=case.vocab_size,
        tok_embeddings=Embedding.Config(num_embeddings=case.vocab_size, embedding_dim=m.hidden_size),
        norm=RMSNorm.Config(normalized_shape=m.hidden_size, eps=m.norm_epsilon),
        lm_head=Linear.Config(in_features=m.hidden_size, out_features=case.vocab_size),
        layers=layers,
    )
    model = config.build()
    model.load_state_dict(Llama3StateDictAdapter(config, None).from_hf(case.weights()), strict=False)
    positions = torch.arange(case.tokens)[None]
    masks = model.get_attention_masks(positions)

    def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens, positions, masks).flatten(0, 1).float(), targets.flatten())

    return torch_step(case, model, loss_of)
