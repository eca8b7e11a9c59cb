"""Refusals of attention over ranks in megatron-core; examples/megatron_ring.py compares losses and gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.errors import assert_as_exact_as, refused
from helpers.plain_attention import exact_attention, torch_attention, visible_pairs
from longring.adapters.megatron_core import ContextParallelAttention, over_ranks
from longring.kernels.layout import SeqLayout
from longring.parallel.cp.grid import CpGrid
from longring.parallel.cp.shared import ContextParallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig


def refusals() -> list[str]:
    """Collect the message of each wrong call, and see that the call with its advice taken goes through."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    layer: Any = get_gpt_layer_local_spec()
    alone: Any = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    parallel, of_one = ContextParallel(None, CpGrid.ring(2)), ContextParallel(alone, CpGrid())
    config = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "use_cpu_initialization": True}
    groups = SimpleNamespace(cp=dist.group.WORLD)

    def core(over: ContextParallel, **settings) -> ContextParallelAttention:
        spec: Any = over_ranks(layer, over)
        build = spec.submodules.self_attention.submodules.core_attention
        made = TransformerConfig(**config, **{"attention_dropout": 0.0, **settings})
        return build(made, 1, AttnMaskType.causal, "self", pg_collection=groups)

    attention = core(parallel)
    assert not isinstance(layer.submodules.self_attention.submodules.core_attention, ContextParallelAttention)
    q = torch.zeros(4, 1, 2, 16)
    attention(q, q, q, None)
    assert [core(parallel, window_size=(before, 0)).window for before in (-1, 2)] == [None, 3]
    return [
        refused(lambda: core(of_one)),
        refused(lambda: core(parallel, attention_dropout=0.1)),
        refused(lambda: attention(q, q, q, torch.ones(1, 1, 8, 8))),
        refused(lambda: attention(q, q, q, None, AttnMaskType.no_mask)),
    ]


NUM_TOKENS, SCALE = 12, 0.7


def inputs() -> list[torch.Tensor]:
    """Return q, k and v of a whole sequence, `[b, s, h, d]`, for which the default scale is 0.25."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, NUM_TOKENS, 2, 16, generator=generator) for _ in range(3)]


def scaled_by_the_layer() -> torch.Tensor:
    """Return attention of the whole sequence by a core with a softmax scale, `[b, s, h, d]`."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    parallel = ContextParallel(None, CpGrid.ring(2))
    spec: Any = over_ranks(get_gpt_layer_local_spec(), parallel)  # type: ignore[arg-type]
    made = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=2, use_cpu_initialization=True, attention_dropout=0.0
    )
    build, groups = spec.submodules.self_attention.submodules.core_attention, SimpleNamespace(cp=dist.group.WORLD)
    core = build(made, 1, AttnMaskType.causal, "self", softmax_scale=SCALE, pg_collection=groups)
    sequence = parallel.sequence(NUM_TOKENS)
    q, k, v = (sequence.shard(x).transpose(0, 1) for x in inputs())  # [s, b, h, d]
    return sequence.unshard(core(q, k, v, None).transpose(0, 1).unflatten(2, (2, 16)))


@pytest.mark.full
def test_the_softmax_scale_is_the_layers(on_ranks):
    whole = SeqLayout.contiguous(NUM_TOKENS)
    pairs = visible_pairs(whole, whole)
    plain = torch_attention(*inputs(), pairs, SCALE)  # type: ignore[call-arg]
    exact, _ = exact_attention(*inputs(), pairs, SCALE)  # type: ignore[call-arg]
    for found in on_ranks(2, scaled_by_the_layer):
        assert_as_exact_as({"out": found}, {"out": plain}, {"out": exact}, factor=2, what="scale")


@pytest.mark.full
def test_what_ranks_cannot_share_is_refused(on_ranks):
    for told in on_ranks(2, refusals):
        # megatron-core adds to an error in the making of a module where it was.
        assert [text.partition("; ")[2].partition(" when instantiating")[0] for text in told] == [
            "make it as ContextParallel(parallel_state.get_context_parallel_group(), grid)",
            "set it to 0.0",
            "give None",
            "give None",
        ]
        assert "attention over ranks has only 0.0" in told[1]
        assert "attention over ranks is causal over whole sequences" in told[2]
        assert "attention over ranks is causal; give None" in told[3]
