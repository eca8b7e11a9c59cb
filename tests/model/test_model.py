"""Parts of the decoder; tests/launch/test_equivalence.py compares the whole decoder to plain PyTorch."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from helpers.errors import gradient
from hypothesis import given
from hypothesis import strategies as st
from longring.kernels.layout import SeqLayout
from longring.launch.build import attention_on_one_rank
from longring.launch.settings import from_tree
from longring.model.config import UNSCALED, ModelConfig, RopeScaling
from longring.model.fused import TORCH
from longring.model.rope import frequencies, rope_table
from longring.model.transformer import Transformer
from longring.model.weights import fill_weights
from longring.parallel.config import ParallelConfig
from longring.parallel.mesh import join, megatron_config
from longring.parallel.zero import zero_engine

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 48}


@pytest.mark.parametrize("start", [0, 1000, 2**20])
def test_rope_rotates_pairs_as_complex_numbers(start):
    """RoPE is exact also at position 10^6, where angles computed in fp32 would be wrong in the second digit."""
    positions, base, dim = torch.arange(start, start + 7), 5e6, 16
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 3, dim, generator=generator)
    turned, _ = TORCH.rope(x, x, rope_table(positions, dim, base))
    angle = positions.double()[:, None] * base ** (-torch.arange(0, dim, 2).double() / dim)
    exact = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)[None, :, None]
    torch.testing.assert_close(turned.double(), torch.cat([exact.real, exact.imag], -1), rtol=0, atol=2e-6)


@given(shift=st.integers(0, 100_000))
def test_rope_scores_depend_on_distance_only(shift):
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator)

    def score(at: int) -> float:
        tables = [rope_table(torch.tensor([position]), 8, 1e4) for position in (at + 5, at)]
        return float((TORCH.rope(q, k, tables[0])[0] * TORCH.rope(q, k, tables[1])[1]).sum())

    assert score(shift) == pytest.approx(score(0), abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_heads": 5},
            "model.hidden_size = 32 over model.num_heads = 5: the quotient, the head dim, must be an even",
        ),
        ({"num_heads": 32, "num_kv_heads": 32}, "model.head_dim = 1: must be even"),
        ({"num_kv_heads": 3}, "model.num_kv_heads = 3: must divide model.num_heads = 4"),
        (
            {"window_tokens": 8},
            "model.window_tokens = 8 with model.layer_pattern of full: windowed layers need both",
        ),
    ],
)
def test_impossible_sizes_raise(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**SIZES, **change})


def test_kinds_of_layers_repeat_up_to_the_last():
    config = ModelConfig(
        **{**SIZES, "num_layers": 6},
        layer_pattern=("window", "full_no_rope", "full"),
        window_tokens=8,
        rope_scaling=RopeScaling(kind="linear", factor=2, full_layers_only=True),
    )
    assert [config.attention_window(layer) for layer in range(6)] == [8, None, None] * 2
    assert [config.rope_scaling_of(layer) for layer in range(6)] == [UNSCALED, None, config.rope_scaling] * 2
    assert ModelConfig(**SIZES).head_dim == 8
    assert ModelConfig(**SIZES, head_dim=12).head_dim == 12


def test_earlier_recipes_say_the_pattern_by_a_period():
    tree = {**SIZES, "window_tokens": 8, "full_attention_every": 3}
    assert from_tree(ModelConfig, tree).layer_pattern == ("window", "window", "full")
    assert from_tree(ModelConfig, {**SIZES, "full_attention_every": 1}) == ModelConfig(**SIZES)
    for wrong in ({"full_attention_every": 0}, {"full_attention_every": 3, "layer_pattern": ["full"]}):
        with pytest.raises(ValueError, match="full_attention_every: unknown key"):
            from_tree(ModelConfig, {**SIZES, **wrong})


DIM, BASE, ORIGINAL = 64, 5e5, 8192


def turns(table: RopeScaling) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the turns of each plain frequency in the original context, and the factor by which it is divided."""
    plain = frequencies(DIM, BASE, UNSCALED)
    return ORIGINAL * plain / (2 * math.pi), plain / frequencies(DIM, BASE, table)


def test_llama3_keeps_fast_frequencies_and_divides_slow_ones():
    at, divided = turns(RopeScaling(kind="llama3", factor=8, original_tokens=ORIGINAL))
    assert (divided[at > 4] == 1).all()
    torch.testing.assert_close(divided[at < 1], torch.full_like(divided[at < 1], 8))
    between = divided[(at > 1) & (at < 4)]
    assert len(between) >= 2
    assert ((between > 1) & (between < 8)).all()


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_blends_along_the_index(truncate):
    at, divided = turns(RopeScaling(kind="yarn", factor=8, original_tokens=ORIGINAL, truncate=truncate))
    kept = (1 / divided - 1 / 8) / (1 - 1 / 8)
    torch.testing.assert_close(kept[at > 50], torch.ones_like(kept[at > 50]))
    torch.testing.assert_close(kept[at < 0.5], torch.zeros_like(kept[at < 0.5]), atol=1e-12, rtol=0)
    steps = -kept.diff()
    inner = steps[1:-1][(steps[:-2] > 1e-9) & (steps[2:] > 1e-9)]
    torch.testing.assert_close(inner, inner.mean().expand_as(inner))  # a straight line


def test_ntk_divides_the_slowest_frequency_by_the_factor():
    _, divided = turns(RopeScaling(kind="ntk", factor=8))
    assert divided[0] == 1
    assert divided[-1] == pytest.approx(8)


@pytest.mark.parametrize(("given", "factor"), [(0.0, 0.1 * math.log(8) + 1), (1.5, 1.5)])
def test_yarn_multiplies_cos_and_sin(given, factor):
    scaling = RopeScaling(kind="yarn", factor=8, original_tokens=ORIGINAL, attention_factor=given)
    cos, sin = rope_table(torch.arange(5), DIM, BASE, scaling)
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, factor**2))


def test_vectors_begin_without_effect():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 4), "norm": torch.nn.RMSNorm(3)})
    fill_weights(model, ModelConfig(**SIZES), 0, CPU, torch.float32)
    found = dict(model.named_parameters())
    assert not found["a.bias"].any()
    assert bool((found["norm.weight"] == 1).all())
    assert found["a.weight"].any()


def test_vocabulary_is_padded_to_128():
    assert [ModelConfig(**SIZES).padded_vocab_size(n) for n in (1, 128, 129, 50257)] == [128, 128, 256, 50304]
    larger = ModelConfig(**SIZES, vocab_size=300)  # there is room for more tokens than a tokenizer of 250 has
    assert (larger.num_tokens(250), larger.padded_vocab_size(250), larger.padded_vocab_size(400)) == (300, 384, 512)


def new_model(parallel: ParallelConfig, num_layers: int = 2, vocab_size: int = 100) -> Transformer:
    """Return a model with initial weights, fp32."""
    config = ModelConfig(**{**SIZES, "num_layers": num_layers})
    model = Transformer(config, vocab_size, megatron_config(parallel))
    fill_weights(model, config, 0, CPU, torch.float32)
    return model


def deviations() -> dict[str, float]:
    """Return the standard deviation of each matrix of a new model of 8 layers, over all layers, by its name."""
    parallel = ParallelConfig(tokens_per_rank=32)
    join(parallel, 1)
    model = new_model(parallel, num_layers=8, vocab_size=1000)
    matrices: dict[str, list[torch.Tensor]] = {}
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            matrices.setdefault(re.sub(r"\.\d+\.", ".", name), []).append(weight.detach())
    return {name: float(torch.stack(weights).std()) for name, weights in matrices.items()}


def test_the_matrices_that_write_to_the_residual_are_smaller_by_the_root_of_their_number(on_ranks):
    """As in GPT-2: the residual adds two results a layer, so each begins with 1 / (2 layers) of the variance."""
    [found] = on_ranks(1, deviations)
    writing = {"blocks.attention.out.weight", "blocks.mlp.down.weight"}
    others = {"embedding.weight", "blocks.attention.qkv.weight", "blocks.mlp.gate_up.weight", "head.weight"}
    assert set(found) == writing | others
    for name, deviation in found.items():
        expected = ModelConfig(**SIZES).init_std / (4 if name in writing else 1)
        assert deviation == pytest.approx(expected, rel=0.05), name


def embeddings_and_projections() -> list[dict[str, torch.Tensor]]:
    """Return the embedding and first q, k, v projection of models with 2 and 3 layers."""
    parallel = ParallelConfig(tokens_per_rank=32)
    join(parallel, 1)
    models = [new_model(parallel, num_layers=layers) for layers in (2, 3)]
    names = ("embedding.weight", "blocks.0.attention.qkv.weight", "head.weight")
    return [{name: dict(model.named_parameters())[name].detach() for name in names} for model in models]


def test_a_weight_depends_on_its_name_and_on_no_other_weight(on_ranks):
    [(first, second)] = on_ranks(1, embeddings_and_projections)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], first["head.weight"])


def compiled_and_eager() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return pairs of losses and gradients, from the model with compiled layers and from the same model uncompiled."""
    parallel = ParallelConfig(tokens_per_rank=32)
    join(parallel, 1)
    model = new_model(parallel)
    torch.manual_seed(0)
    tokens = torch.randint(0, 100, (2, 33))
    layout = SeqLayout.packed((12, 20))
    attend = attention_on_one_rank("auto", torch.device("cpu"), [None])(layout)

    def results() -> list[torch.Tensor]:
        model.zero_grad()
        losses = model(tokens[:, :-1], tokens[:, 1:], layout, attend)
        losses.sum().backward()
        return [losses.detach(), *(gradient(p).clone() for p in model.parameters())]

    eager = results()
    for layer in model.blocks:
        layer.compile(backend="aot_eager")  # megatron-core's layers break the graph; attention does not
    return list(zip(results(), eager, strict=True))


@pytest.mark.full
def test_compiled_layers_equal_eager_ones(on_ranks):
    for got, expected in on_ranks(1, compiled_and_eager)[0]:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def losses_of_two_sequences() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses of two sequences, each `[s]`, that differ from token 20 on."""
    parallel = ParallelConfig(tokens_per_rank=32)
    join(parallel, 1)
    model = new_model(parallel)
    torch.manual_seed(0)
    tokens = torch.randint(0, 100, (2, 33))
    tokens[1, :20] = tokens[0, :20]
    layout = SeqLayout.contiguous(32)
    attend = attention_on_one_rank("auto", torch.device("cpu"), [None])(layout)

    losses = model(tokens[:, :-1], tokens[:, 1:], layout, attend).detach()
    return losses[0], losses[1]


def test_no_token_sees_a_later_one(on_ranks):
    [(first, second)] = on_ranks(1, losses_of_two_sequences)
    # Position 18 predicts token 19, the last that both sequences share; position 19 has different targets.
    assert torch.equal(first[:19], second[:19])
    assert not torch.equal(first[20:], second[20:])


def weight_checksums(tensor: int) -> list[float]:
    """Return a checksum of this rank's part of the divided weights, and one of the replicated weights."""
    parallel = ParallelConfig(tokens_per_rank=32, tensor=tensor)
    mesh = join(parallel, 1)
    model = new_model(parallel)
    optimizer = torch.optim.AdamW(model.parameters())
    zero_engine(model, optimizer, parallel, mesh, accumulation_steps=1, clip_grad_norm=1.0, dtype="float32")
    # The sum over this rank's part, which the caller adds up; norm weights are whole on every rank.
    cut = sum(float(p.detach().double().square().sum()) for p in model.parameters() if p.dim() > 1)
    return [cut, sum(float(p.detach().sum()) for p in model.parameters() if p.dim() == 1)]


def test_weights_do_not_depend_on_tensor_parallelism(on_ranks):
    [(whole, norms)] = on_ranks(1, weight_checksums, 1)
    parts = on_ranks(2, weight_checksums, 2)
    assert sum(cut for cut, _ in parts) == pytest.approx(whole, rel=1e-12)
    assert [n for _, n in parts] == [norms, norms]
