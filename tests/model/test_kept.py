"""Bytes that a layer keeps for its backward: its input, q, k, v, and attention's out and lse, and no view of more."""

from __future__ import annotations

import pytest
import torch
from longring.kernels.layout import SeqLayout
from longring.launch.build import attention_on_one_rank
from longring.model.config import MemoryConfig, ModelConfig
from longring.model.rope import rope_table
from longring.model.transformer import TransformerLayer
from longring.model.weights import fill_weights
from longring.parallel.config import ParallelConfig
from longring.parallel.mesh import join, megatron_config
from torch import Tensor

TOKENS, HIDDEN, HEADS = 64, 64, 4


def elements_kept(num_kv_heads: int, has_rope: bool) -> float:
    """Return the fp32 elements for each token in all memory that the graph of a recomputed layer holds."""
    config = ModelConfig(
        num_layers=1, hidden_size=HIDDEN, num_heads=HEADS, num_kv_heads=num_kv_heads, ffn_hidden_size=80
    )
    parallel = ParallelConfig(tokens_per_rank=64)
    join(parallel, 1)
    layer = TransformerLayer(config, megatron_config(parallel), 0, MemoryConfig(activations="recompute_layer"))
    fill_weights(layer, config, 0, torch.device("cpu"), torch.float32)
    attend = attention_on_one_rank("torch_cpu", torch.device("cpu"), [None])(SeqLayout.contiguous(TOKENS))
    rope = rope_table(torch.arange(TOKENS), config.head_dim, 1e5) if has_rope else None
    kept: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        if saved.is_floating_point():
            kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        result = layer(torch.randn(TOKENS, 1, HIDDEN, requires_grad=True), rope, attend)
    assert result.requires_grad
    return sum(kept.values()) / 4 / TOKENS


@pytest.mark.parametrize("has_rope", [True, False])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_a_recomputed_layer_keeps_what_the_documents_say(on_ranks, num_kv_heads, has_rope):
    lse = HEADS
    formula = 3 * HIDDEN + 2 * HIDDEN * num_kv_heads / HEADS  # (3 + 2 / g) h
    assert on_ranks(1, elements_kept, num_kv_heads, has_rope) == [formula + lse]
