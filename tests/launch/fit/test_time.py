"""Time of a step against counts by hand, torch's own count of FLOPs, and what holds for every device."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from longring.kernels.layout import SeqLayout
from longring.launch.config import Recipe, load_recipe
from longring.launch.fit.device import SHEETS, Device, named_device
from longring.launch.fit.links import Links, assumed_topology, gather_s, links_of
from longring.launch.fit.time import StepTime, time_of, utilization
from longring.launch.flops import ModelFlops
from longring.launch.grids.choice import choose_grids
from longring.model.transformer import Transformer
from longring.model.weights import fill_weights
from longring.parallel.cp.cost import Speed
from longring.parallel.cp.topology import Fabric, Topology
from longring.parallel.mesh import join, megatron_config
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

VOCABULARY = 500
RATE = 1e9
FAST = 1e30
"""A rate at which work takes no time."""
ONLY_FLOPS = Device("", FAST, RATE, RATE, FAST, FAST, FAST, FAST, Speed(RATE, RATE), 1.0)
NO_COMPUTE = Device("", FAST, RATE, FAST, FAST, FAST, FAST, FAST, Speed(FAST, FAST), 1.0, is_gpu=False)
NODES = Topology("nodes", 4, Fabric("switch", 100.0, 0.0), Fabric("switch", 10.0, 0.0))


def time_on(recipe: Recipe, ranks: int, device: Device, topology: Topology, length: int) -> StepTime:
    links = links_of(recipe, ranks, topology)
    grids = choose_grids(recipe, [length], links.data_ranks, device.attention)
    return time_of(recipe, ranks, length, VOCABULARY, device, links, grids)


def test_products_and_attention_are_the_models_flops(recipe_file):
    recipe = load_recipe(recipe_file)
    flops = ModelFlops.of(recipe.model, 512)  # rows of the head, padded
    found = time_on(recipe, 2, ONLY_FLOPS, NODES, 128)
    assert found.products == pytest.approx(flops.matrices(2048) / 2 / RATE)
    # Attention's kernels form the scores once more in the backward: 14 instead of 12 FLOPs.
    assert found.attention == pytest.approx(14 / 12 * flops.attention([128] * 16) / 2 / RATE)
    assert found.total == pytest.approx(found.products + found.attention + found.exposed, rel=1e-6)
    share = utilization(recipe, 512, 128, 2048 / found.products / 2, RATE)
    assert share == pytest.approx(1 + flops.attention([128] * 16) / flops.matrices(2048))


def counted_again(recipe_file, every: list[list[str]]) -> list[tuple[float, float]]:
    """Return, for each of some settings, the FLOPs that the backward computes again, as torch counts and as predicted.

    A function without products stands for attention.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, _: int | None) -> Tensor:
        return q + (k + v).repeat_interleave(q.shape[2] // k.shape[2], 2)

    found = []
    for overrides in every:
        recipe = load_recipe(recipe_file, ["parallel.tokens_per_rank=64", *overrides])
        mesh = join(recipe.parallel, 1)
        model = Transformer(recipe.model, VOCABULARY, megatron_config(recipe.parallel), recipe.train.memory)
        fill_weights(model, recipe.model, 0, mesh.device, torch.float32)
        tokens = torch.randint(VOCABULARY, (1, 65))
        with FlopCounterMode(display=False) as forward:
            losses = model(tokens[:, :-1], tokens[:, 1:], SeqLayout.contiguous(64), attend)
        with FlopCounterMode(display=False) as backward:
            losses.sum().backward()
        predicted = time_on(recipe, 8, ONLY_FLOPS, NODES, 64)
        micro_batches = recipe.accumulation_steps(8)
        assert micro_batches * 3 * forward.get_total_flops() == pytest.approx(predicted.products * RATE)
        again = backward.get_total_flops() - 2 * forward.get_total_flops()
        found.append((float(again), predicted.again * RATE / micro_batches))
    return found


LEVELS = ("keep", "recompute_mlp", "recompute_layer", "offload")


@pytest.mark.full
def test_what_is_computed_again_is_what_torch_counts(on_ranks, recipe_file):
    every = [
        [f"train.memory={{activations='{level}', mlp_tile_tokens={tile}, kept_logits_gb={kept}}}"]
        for level in LEVELS
        for tile, kept in ((0, 1), (16, 1), (0, 0))
    ]
    every += [["model.norm_order=after", "train.memory.activations=recompute_layer"]]
    [found] = on_ranks(1, counted_again, recipe_file, every)
    for (counted, predicted), of in zip(found, every, strict=True):
        assert predicted == pytest.approx(counted), of


def test_gathers_by_hand():
    assert gather_s(NODES, 1, 1e3, 1.0) == 0
    # Inside a node a rank receives 3 of 4 parts at 100 bytes/s; at half the bandwidth it takes twice as long.
    assert gather_s(NODES, 4, 400.0, 1.0) == 3
    assert gather_s(NODES, 4, 400.0, 0.5) == 6
    # Two nodes of 4: half of all bytes pass the 4 ports of 10 bytes/s of each node, which takes longer than inside.
    assert gather_s(NODES, 8, 400.0, 1.0) == 200 / 40
    shared = replace(NODES, across=Fabric("switch", 10.0, 0.0, ends_per_port=4, full_duplex=False))
    assert gather_s(shared, 8, 400.0, 1.0) == 200 / 5
    # In a mesh all links of a rank receive at once. Latency: once for each doubling of the ranks.
    mesh = Topology("mesh", 4, Fabric("mesh", 100.0, 1.0))
    assert gather_s(mesh, 4, 400.0, 1.0) == 1 + 2


def exposed_on_links_alone(recipe_file, ranks: int, *settings: str) -> StepTime:
    recipe = load_recipe(recipe_file, ["train.dtype=bfloat16", "parallel.tokens_per_rank=128", *settings])
    return time_on(recipe, ranks, NO_COMPUTE, NODES, 64)


@pytest.mark.parametrize(("stage", "bytes_a_parameter"), [(0, 8), (1, 8 + 2), (2, 4 * 8 + 2), (3, 4 * (2 + 2 + 4))])
def test_bytes_of_zero_by_stage(recipe_file, stage, bytes_a_parameter):
    """4 micro-batches on 4 ranks: 3 / 4 of what is gathered. An fp32 sum is two gathers, weights are bfloat16."""
    layer = 64 * (2 * 64 + 2 * 32 + 3 * 96)
    parameters = 2 * layer + 2 * 512 * 64
    found = exposed_on_links_alone(recipe_file, 4, f"parallel.zero_stage={stage}")
    assert found.zero == pytest.approx(0.75 * bytes_a_parameter * parameters / 100)
    assert found.total == pytest.approx(found.zero)


def test_tensor_parallel_messages_by_hand(recipe_file):
    """4 sums a layer, each of two gathers, and two more at the ends; sequence parallelism gathers 2 inputs again."""
    one = 0.5 * 2 * 128 * 64 / 100  # half of a bfloat16 tensor [128, 64]
    for sequence, messages in ((False, 2 * 8 + 4), (True, 2 * 10 + 4)):
        tensor = "parallel.tensor=2", f"parallel.sequence_parallel={str(sequence).lower()}"
        found = exposed_on_links_alone(recipe_file, 8, *tensor, "parallel.zero_stage=0")
        assert found.tensor == pytest.approx(4 * messages * one)  # 4 micro-batches


GPUS = tuple(SHEETS)
SETTINGS = st.tuples(
    st.sampled_from([0, 1, 2, 3]),
    st.sampled_from([1, 2]),
    st.sampled_from(LEVELS),
    st.sampled_from([64, 128, 512]),
)


@pytest.mark.full
@settings(max_examples=15)
@given(SETTINGS, st.sampled_from(GPUS), st.sampled_from([64, 512]))
def test_parts_add_up_and_nothing_is_hidden_on_a_cpu(recipe_file, chosen, name, length):
    stage, tensor, level, tokens = chosen
    recipe = load_recipe(
        recipe_file,
        [
            *("train.dtype=bfloat16", f"parallel.zero_stage={stage}", f"parallel.tensor={tensor}"),
            *(f"train.memory.activations={level}", f"parallel.tokens_per_rank={tokens}"),
            "train.global_batch_tokens=16384",
        ],
    )
    device, topology = named_device(name), assumed_topology("infiniband", 16, name)
    found, serial = (time_on(recipe, 16, one, topology, length) for one in (device, replace(device, is_gpu=False)))
    assert found.total == pytest.approx(math.fsum(found.by_part().values()))
    assert serial.hidden == 0
    # Attention's own messages are hidden by its grid's price on both.
    assert serial.exposed == pytest.approx(found.exposed + found.hidden)
    # On a CPU, AdamW is fused, and the loss head passes over logits more often.
    rest = (part.total - part.exposed - part.update - part.operators for part in (found, serial))
    assert next(rest) == pytest.approx(next(rest)) and serial.update < found.update
    assert serial.operators > found.operators
    # Twice the replicas at the same batch: no rank computes more, but ZeRO's update and messages may differ.
    twice = time_on(recipe, 32, device, assumed_topology("infiniband", 32, name), length)
    assert twice.products <= found.products / 2 * (1 + 1e-9)
    assert twice.update <= found.update * (1 + 1e-9)
    # A bound without grids is not above the price with them.
    links: Links = links_of(recipe, 16, topology)
    assert time_of(recipe, 16, length, VOCABULARY, device, links).total <= found.total * (1 + 1e-9)
