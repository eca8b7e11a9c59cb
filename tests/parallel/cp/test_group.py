"""Context-parallel groups and their channels."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from longring.parallel.cp.execute import AttentionSpec
from longring.parallel.cp.grid import CpGrid
from longring.parallel.cp.group import open_group
from longring.parallel.cp.layout import zigzag
from longring.parallel.cp.visible import Visibility

SIZE = 4


def met_on(grid: CpGrid) -> tuple[set, set]:
    """Return the channels on which this rank joined a collective when they were made, and those that its plans use."""
    met, all_reduce = [], dist.all_reduce

    def counted(tensor, op=dist.ReduceOp.SUM, group=None):
        met.append(group)
        return all_reduce(tensor, op, group)

    dist.all_reduce = counted
    try:
        group = open_group(range(SIZE), [grid])
    finally:
        dist.all_reduce = all_reduce
    spec = AttentionSpec(grid, tuple(zigzag(64, rank, SIZE) for rank in range(SIZE)), Visibility())
    used = {channel for way in ("forward", "backward") for channel in spec.plan(way, group.rank)[1].channels}
    return {channel for channel, made in group.channels.items() if made in met}, used


@pytest.mark.parametrize("grid", [CpGrid.token_ring(SIZE), CpGrid.ring(SIZE)], ids=str)
def test_all_ranks_meet_on_a_channel_that_few_of_them_use(on_ranks, grid):
    """NCCL makes a communicator at the first use, which needs all its ranks at once."""
    found = on_ranks(SIZE, met_on, grid)
    needed = set.union(*(used for _, used in found))
    assert any(used != needed for _, used in found), "some channel is not used by some rank"
    assert all(needed <= met for met, _ in found)
