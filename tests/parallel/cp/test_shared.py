"""A sequence shared over a process group, as another trainer shares it: against one process, and its refusals."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from helpers.errors import assert_as_exact_as
from helpers.plain_attention import answers, visible_pairs
from longring.kernels.layout import SeqLayout
from longring.parallel.cp.grid import CpGrid, Layout
from longring.parallel.cp.shared import ContextParallel

NUM_TOKENS, HEADS, KV_HEADS, HEAD_DIM = 61, 4, 2, 16
STARTS, WINDOW = (0, 5, 6, 40), 7
ATTENTIONS = ((None, None), (WINDOW, None), (None, 0.7), (WINDOW, 0.03))
"""(window, scale) of each call; d^-1/2 = 0.25 is the default scale."""
CASES: list[tuple[CpGrid, Layout]] = [
    (CpGrid(), "zigzag"),
    (CpGrid.ulysses(2), "zigzag"),
    (CpGrid.square(4), "balanced"),
]


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, NUM_TOKENS, h, HEAD_DIM, generator=generator) for h in (HEADS, KV_HEADS, KV_HEADS, HEADS)]


def shared_by_groups(grid: CpGrid, layout: Layout) -> list[dict[str, torch.Tensor]]:
    """Attend to one sequence in a group of the first and one of the last ranks; return the whole results of each call.

    The results are in the order of ATTENTIONS.
    """
    size, rank = grid.size, dist.get_rank()
    groups: list[Any] = [
        dist.new_group(list(range(first, first + size))) for first in range(0, dist.get_world_size(), size)
    ]
    parallel = ContextParallel(groups[rank // size], grid, layout=layout)
    assert (parallel.rank, parallel.size) == (rank % size, size)
    # Integers of any kind are document starts.
    sequence = parallel.sequence(NUM_TOKENS, cast(Any, torch.tensor(STARTS)), windows=(None, WINDOW))
    assert [type(start) for start in sequence.layout.document_starts] == [int] * len(STARTS)
    positions = torch.arange(NUM_TOKENS)
    assert torch.equal(sequence.shard(positions, dim=0), sequence.layout.positions())
    assert torch.equal(sequence.unshard(sequence.shard(positions, dim=0), dim=0), positions)
    found = []
    for window, scale in ATTENTIONS:
        q, k, v, dout = map(sequence.shard, inputs())
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = sequence.attention(q, k, v, window=window, scale=scale)
        grads = torch.autograd.grad(out, leaves, dout)
        parts = zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True)
        found.append({name: sequence.unshard(part) for name, part in parts})
    return found


@pytest.mark.parametrize(("grid", "layout"), CASES, ids=str)
def test_a_shared_sequence_equals_one_process(on_ranks, grid: CpGrid, layout: Layout):
    ranks = on_ranks(2 * grid.size if grid.size < 4 else 4, shared_by_groups, grid, layout)
    whole, (*qkv, dout) = SeqLayout(((0, NUM_TOKENS),), STARTS), inputs()
    for call, (window, scale) in enumerate(ATTENTIONS):
        expected = answers(qkv, dout, visible_pairs(whole, whole, True, window), scale)
        for found in (results[call] for results in ranks):
            plain, exact = ({name: of[name] for name in found} for of in expected)
            assert_as_exact_as(found, plain, exact, factor=2, what=f"{grid}, {layout}, {window}, {scale}:")


def refusals() -> list[str]:
    """Collect the message of each wrong call, carry its advice out, and see the error gone."""
    sizes = [dist.get_world_size()]
    grid, auto = CpGrid.ring(*sizes), cast(Layout, "auto")
    parallel, by_work = ContextParallel(None, grid), ContextParallel(None, grid, layout="documents")
    sequence = parallel.sequence(8)
    q = torch.zeros(1, 4, 1, 8)
    wrong_and_right = [
        (lambda: ContextParallel(None, CpGrid.ring(3)), lambda: ContextParallel(None, CpGrid.ring(2))),
        (lambda: ContextParallel(None, grid, layout=auto), lambda: ContextParallel(None, grid)),
        (lambda: parallel.sequence(8, (0, 9)), lambda: parallel.sequence(8, (0,))),
        (lambda: by_work.sequence(8, cast(Any, (0, 2.5))), lambda: by_work.sequence(8, (0, 2))),
        (lambda: by_work.sequence(8, (0, 2), windows=[]), lambda: by_work.sequence(8, (0, 2))),
        (lambda: sequence.shard(q), lambda: sequence.shard(q.expand(8, 4, 1, 8), dim=0)),
        (lambda: sequence.unshard(q, dim=0), lambda: sequence.unshard(q, dim=1)),
        (
            lambda: sequence.attention(q, q, q, window=2),
            lambda: parallel.sequence(8, windows=[2]).attention(q, q, q, window=2),
        ),
    ]
    told = []
    for wrong, right in wrong_and_right:
        try:
            wrong()
        except ValueError as error:
            told.append(str(error))
        right()
    return told


def test_advice_about_a_shared_sequence(on_ranks):
    for told in on_ranks(2, refusals):
        assert [text.split("; ")[-1] for text in told] == [
            "pass a grid of that size, such as CpGrid.ring(2)",
            "leave it out for zigzag",
            "leave out documents that begin behind the end",
            "convert them to int",
            "leave it out for full attention",
            "pass the dim of the tokens",
            "pass the dim of the tokens",
            "add it there",
        ]


def test_ranks_meet_before_they_share():
    with pytest.raises(ValueError, match=r"call torch\.distributed\.init_process_group\(\)"):
        ContextParallel(None, CpGrid())


def test_a_world_bound_to_a_device_is_refused(monkeypatch):
    world = type("World", (), {"bound_device_id": torch.device("cuda:0")})
    monkeypatch.setattr(dist.distributed_c10d._world, "default_pg", world)
    with pytest.raises(ValueError, match="leave device_id out, and call torch.cuda.set_device before"):
        ContextParallel(None, CpGrid())
