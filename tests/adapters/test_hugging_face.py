"""Models of transformers (Llama, a windowed Mistral, Granite) over rings, compared with one process in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.errors import assert_as_exact_as, gradient, refused
from longring.adapters.hugging_face import model_inputs, register
from longring.parallel.cp.grid import CpGrid
from longring.parallel.cp.shared import ContextParallel
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

NUM_TOKENS, VOCABULARY, WINDOW = 61, 96, 20
DOCUMENTS = (0, 17, 30)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
Results = dict[str, Tensor]


def llama(**settings) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **settings}))


BERT = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}


def mistral() -> PreTrainedModel:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=WINDOW))


def granite() -> PreTrainedModel:
    """Return a model whose scores are scaled by another number than d^-1/2 = 0.29."""
    torch.manual_seed(0)
    return GraniteForCausalLM(GraniteConfig(**SHAPE, attention_multiplier=0.6))


def batch() -> tuple[Tensor, Tensor]:
    """Return tokens, and labels of which some are left out."""
    tokens = torch.randint(VOCABULARY, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    return tokens, tokens.masked_fill(tokens % 7 == 0, -100)


def visible(starts: tuple[int, ...]) -> Tensor:
    """Return the mask `[1, 1, s, s]` of the pairs that causal order and documents allow."""
    document = torch.bucketize(torch.arange(NUM_TOKENS), torch.tensor(starts), right=True)
    return (document[:, None] == document).tril()[None, None]


CASES: dict[str, tuple[Callable[[], PreTrainedModel], tuple[int, ...], CpGrid]] = {
    "Llama": (llama, (0,), CpGrid.token_ring(4)),
    "documents": (llama, DOCUMENTS, CpGrid.square(4)),
    "windows": (mistral, (0,), CpGrid.ring(4)),
    "scale": (granite, (0,), CpGrid.ring(4)),
}


def gradients(model: PreTrainedModel, loss: Tensor) -> Results:
    loss.backward()
    return {name: gradient(parameter) for name, parameter in model.named_parameters()}


def on_one_rank() -> dict[str, tuple[Tensor, Results]]:
    """Return the loss of each case, and the logits of the whole sequence with all gradients."""
    register()
    return {name: over_a_ring(*case) for name, case in CASES.items()}


def over_a_ring(make: Callable[[], PreTrainedModel], starts: tuple[int, ...], grid: CpGrid) -> tuple[Tensor, Results]:
    model, (tokens, labels) = make(), batch()
    model.set_attn_implementation("longring")
    model.activation_checkpointing_enable()  # attention then sends its messages again
    model.train()
    windows = [getattr(model.config, "sliding_window", None)]
    sequence = ContextParallel(None, grid).sequence(NUM_TOKENS, starts, windows=windows)
    out = model(**model_inputs(sequence, tokens, labels))
    loss, found = out.loss.detach(), gradients(model, out.loss)
    for value in (loss, *found.values()):
        dist.all_reduce(value)
    return loss, {"logits": sequence.unshard(out.logits), **found}


@pytest.mark.full
def test_models_over_a_ring_equal_one_process(on_ranks):
    ranks = on_ranks(4, on_one_rank)
    tokens, labels = batch()
    positions = torch.arange(NUM_TOKENS)[None]
    for case, (make, starts, _) in CASES.items():
        losses, alone = {}, {}
        for dtype in (torch.float32, torch.float64):
            model: Any = make()
            model.to(dtype)
            mask = None if starts == (0,) else visible(starts)
            out = model(tokens, mask, positions, labels=labels, use_cache=False)
            losses[dtype] = out.loss.detach()
            alone[dtype] = {"logits": out.logits.detach(), **gradients(model, out.loss)}
        for loss, shared in (results[case] for results in ranks):
            assert_as_exact_as(shared, alone[torch.float32], alone[torch.float64], factor=2, what=case)
            # A mean of some 100 numbers, rounded a few times: plain fp32 may hit it by chance, so it is no yardstick.
            eps = torch.finfo(torch.float32).eps
            assert loss.item() == pytest.approx(losses[torch.float64].item(), rel=8 * eps)


def refusals() -> list[str]:
    """Collect the message of each wrong call, and see that the same call with its advice taken goes through."""
    register()
    tokens, _ = batch()
    parallel = ContextParallel(None, CpGrid())
    inputs = model_inputs(parallel.sequence(NUM_TOKENS), tokens)
    right = llama(attn_implementation="longring").train()
    right(**inputs)
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    documents = model_inputs(parallel.sequence(NUM_TOKENS, DOCUMENTS), tokens)
    right(**documents)
    two_way = BertForMaskedLM(BertConfig(**BERT)).eval()
    two_way.set_attn_implementation("longring")
    return [
        refused(lambda: right(tokens)),
        refused(lambda: right(**inputs, attention_mask=torch.ones_like(tokens))),
        refused(lambda: llama(attn_implementation="longring", attention_dropout=0.1).train()(**inputs)),
        refused(lambda: llama(attn_implementation="longring", rope_parameters=rope)(**inputs)),
        refused(lambda: two_way(**{name: value for name, value in inputs.items() if name != "use_cache"})),
    ]


@pytest.mark.full
def test_what_ranks_cannot_share_is_refused(on_ranks):
    [told] = on_ranks(1, refusals)
    assert [text.split("; ")[-1] for text in told] == [
        "call it as model(**model_inputs(sequence, input_ids, labels))",
        "leave the mask out, and give document_starts to ContextParallel.sequence",
        "take a model whose config asks for none",
        "take a model without them",
        "take a model whose attention is causal",
    ]
