"""The whole family in one process, compared with fp64: every grid, mask, head ratio and dtype."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import NamedTuple

import pytest
import torch
from helpers.errors import assert_as_exact_as, relative_rms
from helpers.lanes import by_lane
from helpers.layouts import of_packing, scattered
from helpers.plain_attention import answers, visible_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from longring.kernels import triton_attention
from longring.kernels.layout import SeqLayout
from longring.kernels.mask import host_masks
from longring.parallel.cp import execute, visible
from longring.parallel.cp import spec as specs
from longring.parallel.cp.compiled import compile_plan
from longring.parallel.cp.execute import AttentionSpec, backward, forward
from longring.parallel.cp.grid import CpGrid, grids
from longring.parallel.cp.heads import heads_for_tokens
from longring.parallel.cp.layout import contiguous, zigzag
from longring.parallel.cp.schedules import Schedule
from longring.parallel.cp.transports import InProcess
from longring.parallel.cp.visible import Visibility
from torch import Tensor

Tensors = dict[str, Tensor]


class Case(NamedTuple):
    """Attention over a whole context, with its inputs."""

    num_tokens: int
    starts: tuple[int, ...] = (0,)
    visibility: Visibility = Visibility()
    num_heads: int = 4
    num_kv_heads: int = 4
    dim: int = 16
    batch: int = 1
    dtype: torch.dtype = torch.float32

    def inputs(self) -> list[Tensor]:
        """Return q, k, v, dout in the dtype of the case, so that rounding of the inputs is no part of the error."""
        generator = torch.Generator().manual_seed(self.num_tokens + self.num_heads)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads, self.num_heads)
        shapes = [(self.batch, self.num_tokens, h, self.dim) for h in heads]
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype) for shape in shapes]


@lru_cache(maxsize=32)
def expected(case: Case) -> tuple[Tensors, Tensors]:
    whole = SeqLayout(((0, case.num_tokens),), case.starts)
    *qkv, dout = case.inputs()
    return answers(qkv, dout, visible_pairs(whole, whole, case.visibility.causal, case.visibility.window))


def named(out: Tensor, lse: Tensor, grads) -> Tensors:
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def by_the_grid(case: Case, grid: CpGrid, cut=zigzag, **options) -> Tensors:
    """Run all ranks of a grid and join their results in the order of the context."""
    layouts = tuple(SeqLayout(cut(case.num_tokens, rank, grid.size).runs, case.starts) for rank in range(grid.size))
    spec = AttentionSpec(grid, layouts, case.visibility, **options)
    q, k, v, dout = ([x[:, layout.positions()] for layout in layouts] for x in case.inputs())
    wires = InProcess()
    passes = [forward(spec, rank, *x, wires) for rank, x in enumerate(zip(q, k, v, strict=True))]
    outs, saved = zip(*wires.drive(passes), strict=True)
    passes = [backward(spec, r, dout[r], saved[r], case.num_kv_heads, wires) for r in range(grid.size)]
    grads = zip(*wires.drive(passes), strict=True)
    order = torch.cat([layout.positions() for layout in layouts]).argsort()
    whole = [torch.cat(parts, dim=1)[:, order] for parts in (outs, *grads)]
    return named(whole[0], whole_lse(grid, layouts, saved), whole[1:])


def whole_lse(grid: CpGrid, layouts, saved) -> Tensor:
    """Join the lse that the ranks saved, each for its heads and the tokens of its grid position: `[b, h, s]`."""
    positions = [
        torch.cat([s[4] for s in saved[at : at + grid.heads]], dim=1) for at in range(0, grid.size, grid.heads)
    ]
    schedule = Schedule(grid, layouts, Visibility(), "forward")
    order = torch.cat([layout.positions() for layout in schedule.layouts]).argsort()
    return torch.cat(positions, dim=2)[:, :, order]


def check(case: Case, grid: CpGrid, cut=zigzag, **options) -> Tensors:
    got = by_the_grid(case, grid, cut, **options)
    assert_as_exact_as(got, *expected(case), factor=2, what=f"{grid}, {case}, {options}:")
    return got


MASKS = {
    "one document": ((0,), Visibility(), zigzag),
    # Documents that end inside a chunk, one of a single token, one that begins at the last token.
    "packed": ((0, 5, 6, 31, 60), Visibility(), zigzag),
    "window": ((0,), Visibility(window=9), zigzag),
    "packed, window": ((0, 17, 40), Visibility(window=12), zigzag),
    "full": ((0,), Visibility(causal=False), zigzag),
    "packed, full": ((0, 5, 6, 31), Visibility(causal=False), scattered),
    "packed, scattered": ((0, 5, 6, 31, 60), Visibility(), scattered),
}


def fitting(grid: CpGrid) -> dict[str, tuple[int, int]]:
    """Return head counts that the grid can divide: as many kv heads as query heads, fewer if it can, and one."""
    divisors = [few for few in range(2, grid.heads) if grid.heads % few == 0]
    few = max(divisors, default=max(grid.heads, 2))
    return {
        "mha": (2 * grid.heads, 2 * grid.heads),
        "gqa": (4 * few, few) if grid.heads < 4 else (2 * grid.heads, few),
        "mqa": (2 * grid.heads, 1),
    }


@pytest.mark.parametrize("dtype", by_lane([torch.float32, torch.bfloat16], quick=[torch.float32]), ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("size", "mask"),
    by_lane(
        product([1, 2, 3, 4, 6, 8], MASKS),
        quick=product([1, 2, 3], MASKS),
        slow=[(size, mask) for size in (6, 8) for mask in MASKS if (size, mask) != (6, "packed, window")],
    ),
)
def test_every_grid_equals_fp64(size, mask, dtype, monkeypatch):
    starts, visibility, cut = MASKS[mask]
    monkeypatch.setattr(visible, "GAP", 1)  # so few rows would always be joined
    for number, grid in enumerate(grids(size)):
        heads = list(fitting(grid).values())
        for num_heads, num_kv_heads in heads if size <= 4 else [heads[number % 3]]:
            case = Case(61, starts, visibility, num_heads, num_kv_heads, dtype=dtype)
            check(case, grid, cut)


NARROWING = [
    CpGrid(query=4),
    CpGrid(query=4, query_route="both_ways"),
    CpGrid(kv=4, kv_route="direct"),
    CpGrid(2, 2, 2),
]


@pytest.mark.parametrize("narrow", [True, False], ids=["narrow", "wide"])
@pytest.mark.parametrize("mask", by_lane(MASKS, quick=["packed, window"]))
@pytest.mark.parametrize("grid", NARROWING, ids=str)
def test_narrow_and_wide_results_are_held_to_one_bound(grid, mask, narrow):
    starts, visibility, cut = MASKS[mask]
    check(Case(61, starts, visibility, 4, 2, dtype=torch.bfloat16), grid, cut, narrow_results=narrow)


@pytest.mark.parametrize("grid", [CpGrid(kv=4), CpGrid(query=4, query_route="round")], ids=str)
def test_results_that_grow_on_their_way_are_never_rounded(grid):
    case = Case(61, (0, 20), Visibility(), 4, 2, dtype=torch.bfloat16)
    narrow, wide = (by_the_grid(case, grid, narrow_results=narrow) for narrow in (True, False))
    assert all(torch.equal(narrow[name], wide[name]) for name in narrow)


@pytest.mark.parametrize("dim", [16, 256])
@pytest.mark.parametrize("cut", [zigzag, contiguous])
@pytest.mark.parametrize("grid", [CpGrid(query=3), CpGrid(kv=3), CpGrid(heads=2), CpGrid(2, 2, 2)], ids=str)
def test_head_dims_and_batches(grid, cut, dim):
    check(Case(37, (0, 11, 30), Visibility(), 4, 2, dim=dim, batch=3), grid, cut)


@settings(max_examples=40)
@given(st.data())
def test_any_grid_any_documents(data):
    size = data.draw(st.integers(1, 12))
    grid = data.draw(st.sampled_from(list(grids(size))))
    num_tokens = 2 * size + data.draw(st.integers(0, 40))
    starts = (0, *sorted(data.draw(st.sets(st.integers(1, num_tokens - 1), max_size=5))))
    visibility = data.draw(
        st.sampled_from([Visibility(), Visibility(causal=False), Visibility(window=3), Visibility(window=num_tokens)])
    )
    heads = data.draw(st.sampled_from(list(fitting(grid).values())))
    by_work = of_packing("balanced", starts), of_packing("documents", starts), of_packing("documents", starts, 2)
    cut = data.draw(st.sampled_from([zigzag, contiguous, scattered, *by_work]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visible, "GAP", data.draw(st.sampled_from([0, 2, 128])))
        got = by_the_grid(Case(num_tokens, starts, visibility, *heads), grid, cut)
    exact = expected(Case(num_tokens, starts, visibility, *heads))[1]
    # With so few numbers plain torch may be exact by chance: the bound is absolute here.
    assert all(relative_rms(got[name], exact[name]) < 2e-6 for name in got)


@pytest.mark.parametrize("cut", [zigzag, scattered, of_packing("balanced", (0, 20))])
@pytest.mark.parametrize("grid", [CpGrid(query=4), CpGrid(2, 2, 2), CpGrid(kv=4, kv_route="both_ways")], ids=str)
def test_equal_runs_are_equal_to_the_last_bit(grid, cut):
    case = Case(61, (0, 20), Visibility(), 4, 2, dtype=torch.bfloat16)
    one, two = by_the_grid(case, grid, cut), by_the_grid(case, grid, cut)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_layout_for_each_rank():
    spec = AttentionSpec(CpGrid(query=4), tuple(zigzag(24, rank, 3) for rank in range(3)), Visibility())
    with pytest.raises(ValueError, match="query=4 is for 4 ranks, and there are 3 layouts"):
        spec.compiled("forward", 0)


@pytest.mark.full
@pytest.mark.parametrize("grid", [CpGrid(query=3), CpGrid(2, 1, 2)], ids=str)
def test_triton_kernels_read_what_travels(grid, monkeypatch):
    """On CUDA tiles and merges are Triton kernels, which take strides of their own."""
    monkeypatch.setattr(execute, "merge_", triton_attention.merge_)
    monkeypatch.setattr(visible, "GAP", 0)
    case = Case(29, (0, 11), Visibility(), 4, 2)
    got, exact = by_the_grid(case, grid, scattered, backend="triton"), expected(case)[1]
    assert all(relative_rms(got[name], exact[name]) < 2e-6 for name in got)


@pytest.mark.parametrize("grid", [CpGrid(query=3), CpGrid(2, 2, 1)], ids=str)
def test_a_prepared_pass_makes_no_plan_and_no_mask(grid, monkeypatch):
    case = Case(37, (0, 11, 30), Visibility(window=9), 4, 2)
    alone = by_the_grid(case, grid)
    init = AttentionSpec.__init__

    def prepared(spec, *arguments, **options):
        init(spec, *arguments, **options)
        with monkeypatch.context() as allowed:
            allowed.setattr(specs, "compile_plan", compile_plan)
            allowed.setattr(specs, "host_masks", host_masks)
            for rank in range(grid.size):
                spec.prepare(rank)

    monkeypatch.setattr(AttentionSpec, "__init__", prepared)
    for name in ("compile_plan", "host_masks"):
        monkeypatch.setattr(specs, name, None)
    got = by_the_grid(case, grid)
    assert all(torch.equal(got[name], alone[name]) for name in got)


@pytest.mark.parametrize(("heads", "num_heads", "num_kv_heads", "fits"), [
    (4, 8, 8, True), (4, 8, 2, True), (4, 8, 1, True), (2, 12, 6, True), (4, 6, 2, False), (4, 12, 6, False),
])  # fmt: skip
def test_heads_that_cannot_be_divided(heads, num_heads, num_kv_heads, fits):
    assert (CpGrid(heads=heads).unfit(num_heads, num_kv_heads) is None) == fits


def test_every_rank_waiting_is_an_error():
    """If one rank is missing, no other can go on."""
    case, grid = Case(24), CpGrid(kv=3)
    layouts = tuple(zigzag(24, rank, 3) for rank in range(3))
    spec, wires = AttentionSpec(grid, layouts, Visibility()), InProcess()
    passes = []
    for rank in (0, 1):
        q, k, v, _ = (x[:, layouts[rank].positions()] for x in case.inputs())
        passes.append(forward(spec, rank, q, k, v, wires))
    with pytest.raises(AssertionError, match="every rank waits"):
        wires.drive(passes)


def test_gradients_of_a_kv_head_of_many_ranks_are_summed_in_fp32():
    """256 and seven halves: bfloat16 has steps of 2 at 256, so adding one after the other would leave 256."""
    grid = CpGrid.ulysses(8)
    layouts = tuple(zigzag(16, rank, 8) for rank in range(8))
    spec, transport = AttentionSpec(grid, layouts, Visibility()), InProcess()

    def back(rank: int):
        plan = spec.compiled("backward", rank)
        part = torch.full((1, 16, 1, 4), 256.0 if rank == 0 else 0.5, dtype=torch.bfloat16)
        return heads_for_tokens([part], [1], plan, grid.heads, transport)

    for (summed,) in transport.drive([back(rank) for rank in range(8)]):
        assert torch.equal(summed, torch.full((1, 2, 1, 4), 260.0, dtype=torch.bfloat16))
