"""The order of every rank's calls to NCCL: one total order, so no ranks wait for each other, whatever they compute."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import lcm

import pytest
import torch
import torch.distributed as dist
from helpers.lanes import by_lane
from helpers.nccl_rules import Call, deadlock, messages_of, recorded
from hypothesis import given, settings
from hypothesis import strategies as st
from longring.kernels.layout import SeqLayout
from longring.parallel.cp.attention import context_attention
from longring.parallel.cp.execute import AttentionSpec
from longring.parallel.cp.grid import CpGrid, Layout, grids
from longring.parallel.cp.group import open_group
from longring.parallel.cp.layout import zigzag
from longring.parallel.cp.packed import divided
from longring.parallel.cp.visible import Visibility
from torch.testing._internal.distributed.fake_pg import FakeStore

Layer = tuple[CpGrid, tuple[int, ...], int | None]
"""Grid, document starts, attention window."""
LAYOUTS: tuple[Layout, ...] = ("zigzag", "balanced", "documents")


def calls_of(rank: int, layers: Sequence[Layer], num_tokens: int) -> tuple[list[Call], list[Call]]:
    """Return the calls of a rank: those that open its group, and those of the layers' forward and backward.

    The rank is alone: a fake process group takes its messages, and what it receives is not defined.
    """
    size = layers[0][0].size
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        with recorded() as opening:
            group = open_group(range(size), [grid for grid, _, _ in layers])
        with recorded() as passes:
            heads = lcm(*(grid.heads for grid, _, _ in layers))
            out = torch.zeros(1, zigzag(num_tokens, rank, size).num_tokens, heads, 8, requires_grad=True)
            for grid, starts, window in layers:
                cut: Layout = LAYOUTS[len(starts) % len(LAYOUTS)]
                layouts = tuple(SeqLayout(runs, starts) for runs in divided(cut, num_tokens, starts, size))
                spec = AttentionSpec(grid, layouts, Visibility(window=window))
                out = context_attention(out, out, out, spec, group)
            out.sum().backward()
        return opening, passes
    finally:
        dist.destroy_process_group()


def assert_no_hang(layers: Sequence[Layer], num_tokens: int) -> None:
    of_ranks = [calls_of(rank, layers, num_tokens) for rank in range(layers[0][0].size)]
    for opening, passes in of_ranks:
        assert messages_of(passes) <= messages_of(opening), "a pair first meets within a pass"
    for rule in ("first use", "one queue"):
        found = deadlock([opening + passes for opening, passes in of_ranks], rule)
        assert found is None, f"{layers}, {rule}: {found}"


@pytest.mark.parametrize("size", by_lane(range(2, 9), quick=[2, 3], slow=[5, 6, 7, 8]))
def test_no_grid_hangs(size):
    """Every grid of up to 8 ranks, under a causal mask."""
    for grid in grids(size):
        assert_no_hang([(grid, (0,), None)], 4 * size)


@st.composite
def stacks(draw) -> tuple[list[Layer], int]:
    """Two or three layers over up to 16 ranks, each with a grid, documents and an attention window of its own."""
    size = draw(st.integers(2, 16))
    num_tokens = draw(st.integers(2 * size, 6 * size))
    lengths = st.lists(st.integers(1, num_tokens), max_size=4).map(lambda found: tuple(accumulate(found, initial=0)))
    documents = lengths.map(lambda starts: tuple(start for start in starts if start < num_tokens))
    window = st.none() | st.integers(1, num_tokens)
    layer = st.tuples(st.sampled_from(list(grids(size))), documents, window)
    return draw(st.lists(layer, min_size=2, max_size=3)), num_tokens


@pytest.mark.parametrize("examples", by_lane([10, 60], quick=[], slow=[60]))
def test_no_stack_of_layers_hangs(examples):
    @settings(max_examples=examples)
    @given(stacks())
    def check(drawn):
        assert_no_hang(*drawn)

    check()


def test_a_group_is_refused_where_its_members_alone_cannot_make_it():
    """With a bound device, torch splits the world's communicator for a group, and that takes all ranks of the world."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        assert dist.group.WORLD is not None
        dist.group.WORLD.bound_device_id = torch.device("cuda", 0)
        with pytest.raises(AssertionError, match="device_id"):
            open_group(range(2), [CpGrid.ring(2)])
    finally:
        dist.destroy_process_group()
