"""The advice of errors about arguments works: after it is carried out, the error is gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from longring.kernels.attention import attention
from longring.kernels.layout import SeqLayout
from longring.kernels.mask import make_mask
from longring.parallel.cp.attention import context_attention
from longring.parallel.cp.choose import PricedGrid, Pricer, choose
from longring.parallel.cp.cost import AttentionShape, Speed
from longring.parallel.cp.execute import AttentionSpec
from longring.parallel.cp.grid import CpGrid
from longring.parallel.cp.group import CpGroup
from longring.parallel.cp.layout import contiguous, zigzag
from longring.parallel.cp.packed import divided
from longring.parallel.cp.schedules import Schedule
from longring.parallel.cp.topology import Fabric, Topology
from longring.parallel.cp.visible import Visibility

WHOLE = SeqLayout.contiguous(8)
ALONE = CpGroup(0, (0,), {})


def attend(num_tokens: int, grid: CpGrid) -> torch.Tensor:
    q = torch.zeros(1, num_tokens, 2, 4)
    return context_attention(q, q, q, AttentionSpec(grid, (WHOLE,), Visibility()), ALONE)


def plans(num_layouts: int) -> object:
    layouts = tuple(zigzag(8, rank, num_layouts) for rank in range(num_layouts))
    return Schedule(CpGrid(kv=2), layouts, Visibility(), "forward").plans()


def masked(num_tokens: int) -> torch.Tensor:
    q = torch.zeros(1, num_tokens, 1, 4)
    return attention(q, q, q, make_mask(WHOLE, WHOLE))


def fabric(kind: Any) -> Fabric:
    return Fabric(kind, 1.0, 1.0)


def grid(**settings: Any) -> CpGrid:
    return CpGrid(kv=2, **settings)


def chosen(size: int, preset: str = "nvswitch") -> list[PricedGrid]:
    return choose(size, Pricer(64, AttentionShape(2, 2, 4), Topology.preset(preset, 2)))


CASES: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
    "use fewer ranks": (lambda: zigzag(8, 0, 8), lambda: zigzag(8, 0, 4)),
    "cannot be cut into 3 parts; use fewer ranks": (lambda: contiguous(2, 0, 3), lambda: contiguous(2, 0, 2)),
    "zigzag: rank = 4: must be at least 0 and below size = 4; give the rank's own index": (
        lambda: zigzag(8, 4, 4), lambda: zigzag(8, 3, 4)
    ),
    "contiguous: rank = 4: must be at least 0 and below size = 4; give the rank's own index": (
        lambda: contiguous(8, 4, 4), lambda: contiguous(8, 3, 4)
    ),
    "sort them, and leave out empty ones": (
        lambda: SeqLayout(((4, 8), (2, 2), (0, 2))), lambda: SeqLayout(((0, 2), (4, 8)))
    ),
    "must ascend strictly from 0; sort them, each once, with 0": (
        lambda: SeqLayout(((0, 8),), (5, 3, 5)), lambda: SeqLayout(((0, 8),), (0, 3, 5))
    ),
    "must ascend strictly from 0 to below num_tokens = 8; sort them, each once, with 0": (
        lambda: divided("documents", 8, (0, 5, 3), 2), lambda: divided("documents", 8, (0, 3, 5), 2)
    ),
    "; ask the layout that holds it": (lambda: zigzag(8, 0, 2).row_of(3), lambda: zigzag(8, 1, 2).row_of(3)),
    "give one for each rank": (lambda: plans(1), lambda: plans(2)),
    r"pass the tokens of spec.layouts\[0\]": (lambda: attend(7, CpGrid()), lambda: attend(8, CpGrid())),
    "topology = 'nvlink': is not a preset; name one of nvswitch, full_mesh, pcie_pairs, infiniband, ethernet": (
        lambda: Topology.preset("nvlink", 4), lambda: Topology.preset("nvswitch", 4)
    ),
    "kind = 'star': must be one of switch, mesh, ring; name one of these kinds": (
        lambda: fabric("star"), lambda: fabric("ring")
    ),
    "bytes_per_s = -1, latency_s = 0, ends_per_port = 1: must be above 0, .*; take those of `probe` or of a preset": (
        lambda: Fabric("switch", -1, 0), lambda: Topology.preset("nvswitch", 4).inside
    ),
    "ranks_per_node = 0: must be at least 1; give the number of ranks of a node, or all ranks if they are on one": (
        lambda: Topology.preset("nvswitch", 0), lambda: Topology.preset("nvswitch", 4)
    ),
    "backward_flops = 0, tile_s = 0.0: must be above 0, .*; take those of `probe`, or leave the speed out": (
        lambda: Speed(1e12, 0), lambda: Pricer(64, AttentionShape(2, 2, 4), Topology.preset("nvswitch", 2))
    ),
    "head_dim = 0, itemsize = 2, batch = 1: each must be at least 1; give those of q, k and v": (
        lambda: AttentionShape(4, 2, 0), lambda: AttentionShape(4, 2, 16)
    ),
    "grid: kv = 0: must be at least 1; leave it out for 1": (lambda: CpGrid.square(0), lambda: CpGrid()),
    "kv_route = 'home': must be one of round, round_and_home, both_ways, direct; leave it out for the default": (
        lambda: grid(kv_route="home"), lambda: grid()
    ),
    "order = 'row': must be one of rows, rows_own_first, columns, columns_own_first; leave it out for the default": (
        lambda: grid(order="row"), lambda: grid()
    ),
    "query = 'two': must be a whole number; leave it out for 1": (
        lambda: CpGrid.parse("query=two, kv=2"), lambda: CpGrid.parse("kv=2")
    ),
    "kv is given twice; leave one of them out": (
        lambda: CpGrid.parse("kv=2, kv=4"), lambda: CpGrid.parse("kv=4")
    ),
    "kv_route = 'home': must be one of round, .*, direct; leave it out for the default": (
        lambda: CpGrid.parse("kv=2, kv_route=home"), lambda: CpGrid.parse("kv=2")
    ),
    "num_kv_heads = 3: .*; give the numbers of one tensor-parallel rank": (
        lambda: AttentionShape(4, 3, 16), lambda: AttentionShape(4, 2, 16)
    ),
    "size = 0: must be at least 1; give the number of ranks that share a sequence": (
        lambda: chosen(0), lambda: chosen(2)
    ),
    "topology 'nvswitch': has 2 ranks, and context parallelism is over 4; take one of several nodes, or measure it": (
        lambda: chosen(4), lambda: chosen(4, "infiniband")
    ),
    "choose a grid whose heads fit": (lambda: attend(8, CpGrid(heads=3)), lambda: attend(8, CpGrid())),
    "make the mask from the layouts of q and k": (lambda: masked(7), lambda: masked(8)),
    "give None for no window": (
        lambda: make_mask(WHOLE, WHOLE, window=0), lambda: make_mask(WHOLE, WHOLE, window=None)
    ),
    "set causal = True": (
        lambda: make_mask(WHOLE, WHOLE, window=2, causal=False), lambda: make_mask(WHOLE, WHOLE, window=2, causal=True)
    ),
}  # fmt: skip


@pytest.mark.parametrize("advice", CASES)
def test_advice_about_an_argument(advice: str):
    wrong, right = CASES[advice]
    with pytest.raises(ValueError, match=advice):
        wrong()
    right()
