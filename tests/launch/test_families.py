"""Every family and RoPE scaling against transformers: losses, final hidden states and gradients, on any division.

The oracle is transformers in fp64 with random weights. Its angles are fp32 products, which at the 64 positions here are
off by less than 4e-6, and less in their effect: LongRing, in fp32 with fp64 angles, is held to 1e-5.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_grad
from helpers.errors import relative_rms
from helpers.lanes import by_lane
from helpers.published import PUBLISHED, scaled_down, to_ours
from longring.kernels.layout import SeqLayout
from longring.launch.build import attention_on_one_rank
from longring.model.config import MemoryConfig, RopeScaling
from longring.model.families.read import PublishedModel, read_config
from longring.model.families.weights import Weight, to_theirs, weights_of
from longring.model.families.write import write_config
from longring.model.rope import frequencies, rope_table
from longring.model.transformer import Transformer
from longring.model.weights import fill_weights
from longring.parallel.config import ParallelConfig
from longring.parallel.cp.attention import context_attention
from longring.parallel.cp.execute import AttentionSpec
from longring.parallel.cp.grid import CpGrid
from longring.parallel.cp.group import open_group
from longring.parallel.cp.layout import zigzag
from longring.parallel.cp.visible import Visibility
from longring.parallel.mesh import Mesh, join, megatron_config
from longring.parallel.zero import zero_engine
from torch import Tensor, nn

TOKENS, VOCABULARY = 64, 100  # 28 rows of the padded vocabulary are padding
TOLERANCE = 1e-5
SIZES: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "rms_norm_eps": 1e-6},
    # The gradient of a padding token's embedding is 0 in transformers.
    **{"pad_token_id": None, "bos_token_id": None, "eos_token_id": None},
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 = {**LLAMA3, "rope_theta": 1e4, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "llama-3.1": {"rope_parameters": LLAMA3},
    "llama-3.2": {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 16},
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "mistral": {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "mistral-window": {"sliding_window": 10, "head_dim": 12},
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen2-yarn": {"rope_parameters": YARN, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "qwen3-yarn": {
        **{"head_dim": 12, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2},
        "rope_parameters": {**YARN, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False, "attention_factor": 1.3},
    },
    "olmo2": {},
    "olmo3": {
        **{
            "sliding_window": 12,
            "num_hidden_layers": 5,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"] * 2,
        },
        "rope_parameters": {
            "full_attention": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "smollm3": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
}


class Division(NamedTuple):
    """A division of one sequence and its model among ranks."""

    cp: int = 1
    tensor: int = 1
    sequence_parallel: bool = False
    zero_stage: int = 0
    grid: str = "token_ring"
    memory: MemoryConfig = MemoryConfig()


def memory(activations: Any, tile_tokens: int = 0, kept_logits_gb: float = 0.0) -> MemoryConfig:
    return MemoryConfig(activations=activations, mlp_tile_tokens=tile_tokens, kept_logits_gb=kept_logits_gb)


DIVISIONS = {
    "one": Division(),
    "cp2": Division(cp=2, grid="ulysses", memory=memory("recompute_layer")),
    "cp4": Division(cp=4, memory=memory("recompute_layer", 5)),
    "tp2": Division(tensor=2, memory=memory("recompute_mlp", 7)),
    "tp2-sp": Division(tensor=2, sequence_parallel=True, memory=memory("keep", 24, 1e-9)),
    "zero3": Division(cp=2, zero_stage=3, memory=memory("offload")),
    "tp2-sp-cp2-zero3": Division(
        cp=2, tensor=2, sequence_parallel=True, zero_stage=3, memory=memory("offload", 10, 1.0)
    ),
}


def oracle_of(
    case: str, dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Any], dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Return config.json, weights and tokens `[1, TOKENS + 1]` of a model of transformers, and its results."""
    transformers = pytest.importorskip("transformers")
    if case in PUBLISHED:
        sizes = scaled_down(PUBLISHED[case][0])
    else:
        sizes = {**SIZES, **CASES[case], "model_type": case.partition("-")[0]}
    # A copy: transformers writes into the tables that it is given.
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(sizes)))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # So large that attention is far from uniform, and every norm and bias counts; values that fp32 has.
            std = 1.5 * weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.3
            values = torch.randn(weight.shape, generator=generator) * std
            weight.copy_(values + ("norm" in name))
    tokens = torch.randint(VOCABULARY, (1, TOKENS + 1), generator=generator)
    result = model(tokens[:, :-1], output_hidden_states=True)
    losses = F.cross_entropy(result.logits[0], tokens[0, 1:], reduction="none")
    losses.mean().backward()
    found = {"losses": losses.detach(), "logits": result.logits[0].detach()}
    found |= {name: weight.grad for name, weight in model.named_parameters()}
    tree = sizes if case in PUBLISHED else json.loads(config.to_json_string(use_diff=True))
    return tree, {name: weight.detach().float() for name, weight in model.named_parameters()}, tokens, found


def ours(tree: dict[str, Any], theirs: dict[str, Tensor], tokens: Tensor, name: str) -> dict[str, Any]:
    """Return this rank's positions, losses and final hidden states, and its part of each gradient."""
    model, division, device = read_config(tree), DIVISIONS[name], torch.device("cpu")
    parallel = ParallelConfig(
        tokens_per_rank=TOKENS,
        tensor=division.tensor,
        sequence_parallel=division.sequence_parallel,
        zero_stage=division.zero_stage,  # type: ignore[arg-type]
    )
    mesh = join(parallel, division.cp)
    net = Transformer(model.config, model.vocab_size, megatron_config(parallel), division.memory)
    fill_weights(net, model.config, 0, device, torch.float32)
    parameters: dict[str, Any] = dict(net.named_parameters())
    assert set(parameters) == {weight.ours for weight in weights_of(model)}
    with torch.no_grad():
        for weight in weights_of(model):
            param = parameters[weight.ours]
            param.copy_(part_of(to_ours(weight, theirs), param, mesh))
    states: list[Tensor] = []
    net.head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0].detach()))
    layout, attention = attention_of(model, mesh, division)
    forward, scale = net, 1.0
    if division.zero_stage:
        optimizer = torch.optim.AdamW(net.parameters())
        forward = zero_engine(net, optimizer, parallel, mesh, accumulation_steps=1, clip_grad_norm=0, dtype="float32")
        scale = float(mesh.data_size)  # DeepSpeed averages over them
    at = layout.positions()
    losses = forward(tokens[:, at], tokens[:, at + 1], layout, attention)
    loss = losses.sum() / TOKENS * scale
    forward.backward(loss) if division.zero_stage else loss.backward()  # type: ignore[operator]
    gradients = {name: safe_get_full_grad(p) if division.zero_stage else p.grad for name, p in parameters.items()}
    cuts = {name: cut_of(param) for name, param in parameters.items()}
    return {"at": at, "losses": losses.detach()[0], "states": states[0], "gradients": gradients, "cuts": cuts}


def cut_of(param: Any) -> tuple[int, int] | None:
    """Return dim and stride by which tensor parallelism divides a parameter."""
    return (param.partition_dim, param.partition_stride) if getattr(param, "tensor_model_parallel", False) else None


def part_of(whole: Tensor, param: nn.Parameter, mesh: Mesh) -> Tensor:
    """Return this rank's part of a whole parameter."""
    if (cut := cut_of(param)) is None:
        return whole
    dim, stride = cut
    parts = whole.unflatten(dim, (stride, mesh.tensor_size, -1))
    return parts.select(dim + 1, mesh.tensor_rank).flatten(dim, dim + 1)


def attention_of(model: PublishedModel, mesh: Mesh, division: Division) -> tuple[SeqLayout, Any]:
    """Return the layout of this rank's tokens, and attention over all of the sequence."""
    windows = {model.config.attention_window(layer) for layer in range(model.config.num_layers)}
    if division.cp == 1:
        layout = SeqLayout.contiguous(TOKENS)
        return layout, attention_on_one_rank("auto", mesh.device, windows)(layout)
    grid = CpGrid.token_ring(division.cp) if division.grid == "token_ring" else CpGrid(heads=division.cp)
    group = open_group(mesh.neighbours[division.cp], [grid])
    layouts = tuple(zigzag(TOKENS, rank, division.cp) for rank in range(division.cp))
    specs = {window: AttentionSpec(grid, layouts, Visibility(window=window)) for window in windows}
    return layouts[group.rank], lambda q, k, v, window: context_attention(q, k, v, specs[window], group)


def results(case: str, ranks: list[dict[str, Any]], tree: dict[str, Any], head: Tensor, division: Division):
    """Return the results of all ranks as one rank alone would have them, by the names of transformers."""
    model = read_config(tree)
    losses, states = torch.zeros(TOKENS), torch.zeros(TOKENS, model.config.hidden_size)
    for first in range(0, len(ranks), division.tensor):
        group = ranks[first : first + division.tensor]  # they hold the same tokens
        losses[group[0]["at"]] = group[0]["losses"]
        parts = [rank["states"][:, 0] for rank in group]
        states[group[0]["at"]] = torch.cat(parts) if division.sequence_parallel else parts[0]
        assert all(torch.equal(rank["losses"], group[0]["losses"]) for rank in group)
    found = {"losses": losses, "logits": states.double() @ head.double().T}
    for weight in weights_of(model):
        found |= to_theirs(weight, gradient_of(weight, ranks, division))
    return found


def gradient_of(weight: Weight, ranks: list[dict[str, Any]], division: Division) -> Tensor:
    """Return the whole gradient of a parameter, summed over the ranks of a ring."""
    slices = []
    for tensor_rank in range(division.tensor):
        of_data = [rank["gradients"][weight.ours] for rank in ranks[tensor_rank :: division.tensor]]
        # Under ZeRO 3 every rank has been given the sum already.
        slices.append(of_data[0] if division.zero_stage else torch.stack(of_data).sum(0))
    if (cut := ranks[0]["cuts"][weight.ours]) is None:
        assert all(torch.equal(one, slices[0]) for one in slices), f"{weight.ours}: differs between its replicas"
        return slices[0]
    dim, stride = cut
    return torch.stack([one.unflatten(dim, (stride, -1)) for one in slices], dim + 1).flatten(dim, dim + 2)


COVERING = [
    *[
        ("llama", "one"),
        ("llama-3.2", "zero3"),
        ("qwen2-yarn", "tp2-sp"),
        ("qwen3", "tp2"),
        ("olmo3", "tp2-sp-cp2-zero3"),
    ],
    *[("smollm3", "cp2"), ("mistral-window", "cp4"), ("qwen3-yarn", "one"), ("olmo2", "one"), ("llama-linear", "one")],
]
EVERY = [(case, division) for case in CASES for division in DIVISIONS]


@pytest.mark.parametrize(
    ("case", "division"), by_lane(EVERY, quick=[], slow=[pair for pair in EVERY if pair not in COVERING])
)
def test_a_family_equals_transformers(on_ranks, case, division, record_property):
    tree, weights, tokens, exact = oracle_of(case)
    at = DIVISIONS[division]
    ranks = on_ranks(at.cp * at.tensor, ours, tree, weights, tokens, division)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    errors = errors_of(results(case, ranks, tree, head, at), exact)
    record_property("errors", json.dumps(errors))  # for benchmarks/family_parity.py
    if division == "one":
        record_property("transformers", json.dumps(errors_of(oracle_of(case, torch.float32)[-1], exact)))
    check(errors)


@pytest.mark.full
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_scaled_down_equal_transformers(on_ranks, name):
    """Their config.json has the words of transformers 4, which LongRing reads and transformers 5 here."""
    tree, weights, tokens, exact = oracle_of(name)
    ranks = on_ranks(1, ours, tree, weights, tokens, "one")
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    check(errors_of(results(name, ranks, tree, head, Division()), exact))


def errors_of(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Return the relative error of each result; of the logits, also within and beyond the original context."""
    assert got.keys() == exact.keys()
    errors = {name: relative_rms(got[name], exact[name]) for name in exact}
    original = SIZES["max_position_embeddings"]
    for name, part in (("logits within", slice(original)), ("logits beyond", slice(original, None))):
        errors[name] = relative_rms(got["logits"][part], exact["logits"][part])
    return errors


def check(errors: dict[str, float]) -> None:
    assert max(errors.values()) <= TOLERANCE, {name: e for name, e in errors.items() if e > TOLERANCE}


CHANGES = {
    "llama-3.1": {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "qwen3-yarn": {"max_window_layers": 3, "layer_types": None},
    "smollm3": {"no_rope_layers": [1, 1, 1, 1]},
    "mistral-window": {"sliding_window": 11},
    "olmo2": {"rms_norm_eps": 1e-3},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CHANGES)
def test_a_setting_that_differs_is_seen(on_ranks, case):
    """The comparison can fail: each of these models differs from that of transformers in one setting."""
    tree, weights, tokens, exact = oracle_of(case)
    changed = {key: value for key, value in {**tree, **CHANGES[case]}.items() if value is not None}
    ranks = on_ranks(1, ours, changed, weights, tokens, "one")
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    with pytest.raises(AssertionError):
        check(errors_of(results(case, ranks, tree, head, Division()), exact))


REAL: dict[str, dict[str, Any]] = {
    "llama-3.1": {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 8192},
    "llama-3.2": {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 8192, "factor": 32.0},
    "qwen": {**YARN, "rope_theta": 1e6, "original_max_position_embeddings": 32768},
    "untruncated": {**YARN, "rope_theta": 5e5, "original_max_position_embeddings": 8192, "truncate": False},
    "a short original": {**YARN, "original_max_position_embeddings": 4},
    "betas": {**YARN, "original_max_position_embeddings": 8192, "beta_fast": 4.0, "beta_slow": 3.9},
    "mscales": {**YARN, "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0},
}


@pytest.mark.full
@pytest.mark.parametrize("name", REAL)
def test_frequencies_equal_those_of_transformers_at_real_sizes(name):
    """Also of its dynamic scaling, which for sequences of twice the length is NTK by 2 * factor - (factor - 1)."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    sizes = {**SIZES, "head_dim": 128, "max_position_embeddings": 131072, "rope_parameters": dict(REAL[name])}
    config = transformers.AutoConfig.for_model("llama", **sizes)
    theirs, their_factor = ROPE_INIT_FUNCTIONS[REAL[name]["rope_type"]](config, "cpu", seq_len=2 * 131072)
    if name == "dynamic":
        scaling = RopeScaling(kind="ntk", factor=2 * 8 - 7)
    else:
        scaling = read_config(json.loads(config.to_json_string())).config.rope_scaling
    found = frequencies(128, REAL[name]["rope_theta"], scaling)
    torch.testing.assert_close(found, theirs.double(), rtol=2e-6, atol=0)
    cos, sin = rope_table(torch.tensor([3]), 128, REAL[name]["rope_theta"], scaling)
    torch.testing.assert_close((cos.square() + sin.square()).sqrt(), torch.full_like(cos, their_factor))


WORDS = {"both": (), "4": ("rope_parameters",), "5": ("rope_theta", "rope_scaling")}
"""Keys that config.json lacks in the words of one version of transformers."""


@pytest.mark.full
@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_what_is_written(case, words):
    """config.json that LongRing writes makes the model of transformers that it was read from, in whichever words."""
    transformers = pytest.importorskip("transformers")
    tree, weights, tokens, exact = oracle_of(case)
    written = json.loads(json.dumps(write_config(read_config(tree))))
    written = {key: value for key, value in written.items() if key not in WORDS[words]}
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(written)))
    if (case, words) == ("olmo3", "4"):  # its base is none that transformers 5 gives windowed layers
        assert config.rope_parameters["sliding_attention"]["rope_theta"] != written["rope_theta"]
        with pytest.raises(ValueError, match="transformers 4 takes it for all layers, and 5 takes 500000"):
            read_config(written)
        return
    assert read_config(written).config == read_config(tree).config
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float64)
    model.load_state_dict({name: weight.double() for name, weight in weights.items()}, strict=False)
    if config.tie_word_embeddings:
        model.tie_weights()
    logits = model(tokens[:, :-1]).logits[0].detach()
    torch.testing.assert_close(logits, exact["logits"], rtol=0, atol=1e-9)
