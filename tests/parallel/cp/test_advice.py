"""The advice of errors about arguments works: after it is carried out, the error is gone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from longring.kernels.attention import attention
from longring.kernels.layout import SeqLayout
from longring.kernels.mask import make_mask
from longring.parallel.cp.attention import context_attention
from longring.parallel.cp.execute import AttentionSpec
from longring.parallel.cp.grid import CpGrid
from longring.parallel.cp.group import CpGroup
from longring.parallel.cp.layout import contiguous, zigzag
from longring.parallel.cp.schedules import Schedule
from longring.parallel.cp.topology import Topology
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


CASES: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
    "use fewer ranks": (lambda: zigzag(8, 0, 8), lambda: zigzag(8, 0, 4)),
    "cannot be cut into 3 parts; use fewer ranks": (lambda: contiguous(2, 0, 3), lambda: contiguous(2, 0, 2)),
    "give one for each rank": (lambda: plans(1), lambda: plans(2)),
    r"pass the tokens of spec.layouts\[0\]": (lambda: attend(7, CpGrid()), lambda: attend(8, CpGrid())),
    "topology = 'nvlink': is not a preset; name one of nvswitch, full_mesh, pcie_pairs, infiniband, ethernet": (
        lambda: Topology.preset("nvlink", 4), lambda: Topology.preset("nvswitch", 4)
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
