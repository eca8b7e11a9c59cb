"""Groups of several sizes share one set of communicators, made with the options of the recipe."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.nccl_rules import Call, deadlock, messages_of, recorded
from longring.parallel.cp import group as groups
from longring.parallel.cp.attention import context_attention
from longring.parallel.cp.execute import AttentionSpec
from longring.parallel.cp.grid import CpGrid
from longring.parallel.cp.group import (
    CommunicatorOptions,
    all_links,
    channels_of,
    link_bytes,
    links_of,
    open_channel,
    open_rings,
)
from longring.parallel.cp.layout import zigzag
from longring.parallel.cp.visible import Visibility
from torch.testing._internal.distributed.fake_pg import FakeStore

GRIDS = [CpGrid.ring(2), CpGrid.square(4), CpGrid(2, 2, 2), CpGrid.token_ring(8)]


def calls_of(rank: int) -> tuple[list[Call], list[Call]]:
    """Return the calls of one of 8 ranks: those that open its rings, and those of a pass over each."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
    try:
        with recorded() as opening:
            rings = {size: range(rank - rank % size, rank - rank % size + size) for size in (1, 2, 4, 8)}
            opened = open_rings(rings, GRIDS)
        with recorded() as passes:
            for grid in GRIDS:
                group = opened[grid.size]
                spec = AttentionSpec(grid, tuple(zigzag(64, at, grid.size) for at in range(grid.size)), Visibility())
                x = torch.zeros(1, 64 // grid.size, 2, 8, requires_grad=True)
                context_attention(x, x, x, spec, group).sum().backward()
        return opening, passes
    finally:
        dist.destroy_process_group()


def test_rings_of_all_sizes_share_the_channels_of_the_largest():
    of_ranks = [calls_of(rank) for rank in range(8)]
    for rule in ("first use", "one queue"):
        assert deadlock([opening + passes for opening, passes in of_ranks], rule) is None
    for opening, passes in of_ranks:
        assert messages_of(passes) <= messages_of(opening)
        assert len({call.group for call in opening}) == len(channels_of(GRIDS)) == 12
        assert {call.members for call in passes} == {tuple(range(8))}


def sums() -> tuple[list[float], list[tuple[int, ...]]]:
    """Return the sum over each of this rank's rings, and the members of every collective that they took."""
    rank = dist.get_rank()
    rings = {size: range(rank - rank % size, rank - rank % size + size) for size in (2, 4)}
    opened = open_rings(rings, [CpGrid.ring(2), CpGrid.ring(4)])
    found = []
    with recorded() as calls:
        for group in opened.values():
            x = torch.tensor(10.0**rank)
            group.add_up(x)
            found.append(x.item())
    return found, [call.members for call in calls]


@pytest.mark.full
def test_a_sum_is_of_the_own_ring_and_takes_one_collective(on_ranks):
    found, calls = zip(*on_ranks(4, sums), strict=True)
    assert found == ([11, 1111], [11, 1111], [1100, 1111], [1100, 1111])
    assert calls == ([(0, 1, 2, 3)] * 2,) * 4


def test_nccl_gets_the_options(monkeypatch):
    """This machine has no NCCL: its class of options is replaced."""
    given = {}

    def nccl_options(is_high_priority_stream: bool):
        return SimpleNamespace(is_high_priority_stream=is_high_priority_stream, config=SimpleNamespace())

    def new_group(ranks, **kwargs):
        given.update(kwargs)
        return dist.group.WORLD

    monkeypatch.setattr(groups.dist, "ProcessGroupNCCL", SimpleNamespace(Options=nccl_options), raising=False)
    monkeypatch.setattr(groups.dist, "new_group", new_group)
    monkeypatch.setattr(groups.torch, "zeros", lambda *_, **__: torch.ones(1))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        options = CommunicatorOptions(4, True, timedelta(minutes=7))
        open_channel(range(2), "keys up", torch.device("cuda"), options)
        found = given["pg_options"]
        assert (found.is_high_priority_stream, found.config.max_ctas, found._timeout) == (True, 4, given["timeout"])
        open_channel(range(2), "keys up", torch.device("cpu"), options)
        assert given["pg_options"] is None, "gloo has no such options"
    finally:
        dist.destroy_process_group()


def test_the_estimate_counts_every_link_of_a_rank():
    """A ring sends and receives keys and their gradients: two links each way, of 2 and of 10 MiB a CTA."""
    links = links_of(all_links(CpGrid.ring(4)), 1)
    assert link_bytes(links, 1, 8) == 8 * 2 * (2 + 10) << 20
