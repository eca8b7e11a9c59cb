"""TokenRing: its schedule as integers for all ranks in one process; its numbers on gloo against fp64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from errors import assert_as_exact_as, with_gradients
from hypothesis import given
from hypothesis import strategies as st
from longring.kernels.layout import SeqLayout
from longring.kernels.mask import make_mask, pieces
from longring.parallel.cp.layout import zigzag
from longring.parallel.cp.token_ring import Ring, token_ring_attention, token_ring_step
from plain_attention import exact_attention, torch_attention, visible_pairs


@given(size=st.integers(1, 40))
def test_every_visible_pair_once_and_no_other(size):
    """Chunk by chunk: each rank's tiles over all steps cover the causal triangle exactly."""
    covered: list[tuple[int, int]] = []
    for rank in range(size):
        for s in range(size):
            step = token_ring_step(rank, size, s)
            queries = [step.owner, 2 * size - 1 - step.owner][0 if step.queries == "all" else 1 :]
            keys = [rank, 2 * size - 1 - rank][: 2 if step.keys == "all" else 1]
            if s == 0:
                covered += [(i, j) for i in queries for j in keys if j <= i]
            else:
                assert all(j < i for i in queries for j in keys), "off the diagonal a tile needs no mask"
                covered += [(i, j) for i in queries for j in keys]
    assert sorted(covered) == [(i, j) for i in range(2 * size) for j in range(i + 1)]


@given(size=st.integers(2, 40))
def test_every_rank_owes_the_same_at_every_step(size):
    for s in range(1, size):
        tiles = [token_ring_step(rank, size, s) for rank in range(size)]
        assert {(t.queries == "all") + (t.keys == "all") for t in tiles} == {1}


@given(size=st.integers(2, 40))
def test_half_blocks_stay_half(size):
    """Q walks to the rank before; the receiver never needs a half that its sender no longer holds."""
    for rank in range(size):
        for s in range(size - 1):
            held, wanted = token_ring_step(rank, size, s), token_ring_step((rank - 1) % size, size, s + 1)
            assert held.owner == wanted.owner
            assert held.queries == "all" or wanted.queries == "back"


def test_traffic_is_three_quarters_of_full_blocks():
    """0.75 (n - 1) blocks of Q sent by a rank on average: research for n = 2, 3, 4, 8 agrees."""
    for size in (2, 3, 4, 8, 16):
        halves = sum(
            2 if token_ring_step((rank - 1) % size, size, s + 1).queries == "all" else 1
            for rank in range(size)
            for s in range(size - 1)
        )
        assert halves / 2 / size == 0.75 * (size - 1)


def test_zigzag_as_integers():
    assert [zigzag(16, rank, 4).runs for rank in range(4)] == [
        ((0, 2), (14, 16)),
        ((2, 4), (12, 14)),
        ((4, 6), (10, 12)),
        ((6, 8), (8, 10)),
    ]
    with pytest.raises(ValueError, match="18 tokens cannot be cut into 2 x 4"):
        zigzag(18, 0, 4)


def test_zigzag_of_one_rank_is_a_plain_causal_sequence():
    layout = zigzag(8, 0, 1)
    assert [piece.kind for piece in pieces(make_mask(layout, layout).host_rows)] == ["causal"]
    assert zigzag(8, 0, 1).positions().tolist() == list(range(8))


def ring_result(
    dtype, batch: int, heads: int, kv_heads: int, tokens: int, dim: int, document_starts: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """On every rank: attention over its share; returns out, dq, dk, dv of that share, twice, to see them equal."""
    rank, size = dist.get_rank(), dist.get_world_size()
    ring = Ring(rank, size, dist.new_group(), dist.new_group())
    layout = SeqLayout(ring.layout(tokens).runs, document_starts)
    *qkv, dout = problem(batch, heads, kv_heads, tokens, dim)
    share = [x[:, layout.positions()] for x in (*qkv, dout)]
    results = [with_gradients(partial(token_ring_attention, layout=layout, ring=ring), dtype, *share) for _ in range(2)]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0]), "two runs differ"
    return results[0]


def problem(batch: int, heads: int, kv_heads: int, tokens: int, dim: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens + heads)
    shapes = [(batch, tokens, h, dim) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# Documents with a batch of 1 only: a batch shares them, a second sequence adds nothing.
@pytest.mark.parametrize(("batch", "packed"), [(1, False), (3, False), (1, True)], ids=["1", "batch of 3", "packed"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_equals_one_process_in_fp64(on_ranks, size, heads, kv_heads, batch, dtype, packed):
    tokens, dim = 48 * size, 32
    # Documents that end inside a chunk, on a chunk's edge, and one that is a single token.
    document_starts = (0, 7, 8, tokens // 2, tokens - 5) if packed else (0,)
    # Inputs are rounded to dtype first: what is measured is the arithmetic, not the rounding of its inputs.
    inputs = [x.to(dtype).double() for x in problem(batch, heads, kv_heads, tokens, dim)]
    whole = SeqLayout(((0, tokens),), document_starts)
    visible = visible_pairs(whole, whole)
    exact = with_gradients(lambda *x: exact_attention(*x, visible)[0], torch.float64, *inputs)
    plain = with_gradients(lambda *x: torch_attention(*x, visible), dtype, *inputs)
    shares = on_ranks(size, ring_result, dtype, batch, heads, kv_heads, tokens, dim, document_starts)
    order = torch.cat([zigzag(tokens, rank, size).positions() for rank in range(size)]).argsort()
    got = {name: torch.cat([share[name] for share in shares], dim=1)[:, order] for name in exact}
    assert_as_exact_as(got, plain, exact, factor=2)


def wrong_layout() -> str:
    rank, size = dist.get_rank(), dist.get_world_size()
    q = torch.zeros(1, 8, 2, 16)
    try:
        token_ring_attention(q, q, q, SeqLayout.contiguous(8), ring=Ring(rank, size))
    except ValueError as error:
        return str(error)
    return ""


def test_a_layout_that_is_not_zigzag_is_refused(on_ranks):
    assert all("zigzag is" in message for message in on_ranks(2, wrong_layout))
