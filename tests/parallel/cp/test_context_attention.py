"""The public function on several gloo processes: the whole matrix compared with fp64, and peers that fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.errors import assert_as_exact_as
from helpers.lanes import by_lane
from helpers.layouts import scattered
from helpers.plain_attention import answers, visible_pairs
from longring.kernels.layout import SeqLayout
from longring.parallel.cp.attention import context_attention
from longring.parallel.cp.execute import AttentionSpec, forward
from longring.parallel.cp.grid import CpGrid
from longring.parallel.cp.group import CommunicatorOptions, open_group
from longring.parallel.cp.layout import position_layouts, zigzag
from longring.parallel.cp.topology import PeerCopies
from longring.parallel.cp.transports import between_processes
from longring.parallel.cp.visible import Visibility
from longring.parallel.failures import PeerError

Results = dict[str, torch.Tensor]
MASKS = {
    "one document": ((0,), Visibility(), zigzag),
    "packed": ((0, 5, 6, 19), Visibility(), scattered),
    "window": ((0,), Visibility(window=7), zigzag),
}
SIZES = (1, 2, 3, 4, 6, 8)


def members(size: int) -> set[CpGrid]:
    """Return the named grids, hybrids, and grids over two and three axes, by rows and by columns."""
    found = {CpGrid(), CpGrid.ring(size), CpGrid.ring_both_ways(size), CpGrid.token_ring(size), CpGrid.ulysses(size)}
    found |= {CpGrid.square(size), CpGrid(query=size, query_route="direct", in_flight=2)}
    for a in (a for a in range(2, size) if size % a == 0):
        found |= {CpGrid.hybrid(a, size // a), CpGrid(a, size // a), CpGrid(a, 1, size // a)}
        found.add(CpGrid(query=a, kv=size // a, query_route="both_ways", kv_route="round_and_home", order="columns"))
    if size == 8:
        found |= {CpGrid(2, 2, 2), CpGrid(2, 2, 2, "direct", "direct", "columns_own_first")}
    return {grid for grid in found if grid.size == size}


def heads_for(grid: CpGrid) -> dict[str, tuple[int, int]]:
    few = {1: 2, 2: 2, 3: 3}.get(grid.heads, grid.heads // 2)
    return {"mha": (2 * grid.heads, 2 * grid.heads), "gqa": (4 * few, few), "mqa": (2 * grid.heads, 1)}


def inputs(num_tokens: int, num_heads: int, num_kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_heads)
    shapes = [(1, num_tokens, h, 16) for h in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def on_one_rank(grid: CpGrid, num_tokens: int, peer_copies: PeerCopies) -> dict[tuple[str, str, torch.dtype], Results]:
    """Run each case twice on this rank and compare the runs to the last bit; lse is taken from the saved tensors."""
    rank = dist.get_rank()
    # Slots of 1,000 bytes: most messages take several.
    group = open_group(range(grid.size), [grid], CommunicatorOptions(peer_copies=peer_copies, slot_bytes=1000))
    assert (group.copies is not None) == (peer_copies == "always" and grid.size > 1)
    results = {}
    for mask, (starts, visibility, cut) in MASKS.items():
        layouts = tuple(SeqLayout(cut(num_tokens, r, grid.size).runs, starts) for r in range(grid.size))
        spec = AttentionSpec(grid, layouts, visibility)
        for name, heads in heads_for(grid).items():
            for dtype in (torch.float32, torch.bfloat16):
                q, k, v, dout = (x[:, layouts[rank].positions()] for x in inputs(num_tokens, *heads, dtype))
                runs = []
                for _ in range(2):
                    leaves = tuple(x.clone().requires_grad_() for x in (q, k, v))
                    out = context_attention(leaves[0], leaves[1], leaves[2], spec, group)
                    grads = torch.autograd.grad(out, leaves, dout)
                    runs.append({"out": out.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))})
                assert all(torch.equal(runs[0][x], runs[1][x]) for x in runs[0]), "two runs differ"
                wires = between_processes(group)
                with torch.no_grad():
                    _, saved = wires.drive(forward(spec, rank, q, k, v, wires))
                results[mask, name, dtype] = runs[0] | {"lse": saved[4]}
    return results


@lru_cache
def expected(num_tokens: int, mask: str, heads: tuple[int, int], dtype: torch.dtype) -> tuple[Results, Results]:
    starts, visibility, _ = MASKS[mask]
    whole = SeqLayout(((0, num_tokens),), starts)
    *qkv, dout = inputs(num_tokens, *heads, dtype)
    return answers(qkv, dout, visible_pairs(whole, whole, visibility.causal, visibility.window))


ALL = [(size, grid) for size in SIZES for grid in sorted(members(size), key=str)]
LARGE_IN_FULL = {
    CpGrid.hybrid(2, 3),
    CpGrid(2, 2, 2),
    CpGrid(query=2, kv=4, query_route="both_ways", kv_route="round_and_home", order="columns"),
}
"""Grids of more than 4 ranks in the full lane: a hybrid, all three axes, every route that is not direct."""


@pytest.mark.parametrize(
    ("size", "grid"),
    by_lane(
        ALL,
        quick=[(1, CpGrid()), (2, CpGrid.ring(2)), (4, CpGrid.token_ring(4)), (4, CpGrid.square(4))],
        slow=[(size, grid) for size, grid in ALL if size > 4 and grid not in LARGE_IN_FULL],
    ),
    ids=str,
)
def test_equals_one_process_in_fp64(on_ranks, size, grid):
    check_against_fp64(on_ranks, size, grid, "never")


IN_TURNS = {CpGrid.ring(2), CpGrid(2, 2), CpGrid(query=4, query_route="both_ways")}


@pytest.mark.parametrize(
    ("size", "grid"),
    by_lane(
        COPIED := [(size, grid) for size, grid in ALL if 1 < size <= 4 or grid in LARGE_IN_FULL],
        quick=[],
        slow=[(size, grid) for size, grid in COPIED if grid not in IN_TURNS],
    ),
    ids=str,
)
def test_copies_equal_one_process_in_fp64(on_ranks, size, grid):
    check_against_fp64(on_ranks, size, grid, "always")


def check_against_fp64(on_ranks, size: int, grid: CpGrid, peer_copies: PeerCopies) -> None:
    num_tokens = 8 * size + 13  # not a multiple of 2 x size, except for size 1
    shares = on_ranks(size, on_one_rank, grid, num_tokens, peer_copies)
    for mask, name, dtype in shares[0]:
        layouts = [MASKS[mask][2](num_tokens, rank, size) for rank in range(size)]
        positions = [layout.positions() for layout in position_layouts(layouts, grid.heads)]
        order = torch.cat([layout.positions() for layout in layouts]).argsort()
        parts = [share[mask, name, dtype] for share in shares]
        got = {x: torch.cat([part[x] for part in parts], dim=1)[:, order] for x in ("out", "dq", "dk", "dv")}
        # A rank saves the lse of its heads over the tokens of its grid position.
        lses = [torch.cat([p["lse"] for p in parts[at : at + grid.heads]], 1) for at in range(0, size, grid.heads)]
        got["lse"] = torch.cat(lses, dim=2)[:, :, torch.cat(positions).argsort()]
        found = expected(num_tokens, mask, heads_for(grid)[name], dtype)
        assert_as_exact_as(got, *found, factor=2, what=f"{grid}, {mask}, {name}, {dtype}:")


def with_a_failing_peer(rank: int, store: str, failure: str, peer_copies: PeerCopies) -> None:
    """Run one rank in its own process: rank 1 joins the group and then sleeps or ends; the others print the error."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=3, timeout=timedelta(seconds=60))
    grid = CpGrid.token_ring(3)
    group = open_group(range(3), [grid], CommunicatorOptions(timeout=timedelta(seconds=4), peer_copies=peer_copies))
    q = torch.ones(1, 8, 2, 16)
    spec = AttentionSpec(grid, tuple(zigzag(24, r, 3) for r in range(3)), Visibility())
    context_attention(q, q, q, spec, group)
    dist.barrier()
    if rank == 1:
        if failure == "ends":
            os._exit(1)
        time.sleep(200)
    if failure == "ends":
        time.sleep(1)  # rank 1 ends before anything is posted
    try:
        context_attention(q, q, q, spec, group)
        print("no error", flush=True)
    except PeerError as error:
        print(error, flush=True)
    time.sleep(200)  # otherwise another rank could notice the end of this one


@pytest.mark.full
@pytest.mark.parametrize(("failure", "peer_copies"), [("sleeps", "never"), ("ends", "never"), ("ends", "always")])
def test_a_failing_peer_is_named(failure, peer_copies, tmp_path):
    """The error names the peer. The processes belong to this test: the shared pool would not survive it."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    processes = []
    try:
        for rank in range(3):
            command = [sys.executable, __file__, str(rank), f"file://{tmp_path}/store", failure, peer_copies]
            with (tmp_path / f"rank-{rank}.log").open("w") as log:
                processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        for rank in (0, 2):
            wanted = (
                rf"rank {rank} of 3 could not (send|receive) \w+ of grid position \d (to|from) rank 1 "
                r"\(posted at step \d, due at step \d\): "
                r"rank 1 of the group is gone or does not answer; see the log of global rank 1"
            )
            told, until = "", time.monotonic() + 150
            while not re.search(wanted, told) and processes[rank].poll() is None and time.monotonic() < until:
                time.sleep(0.1)
                told = (tmp_path / f"rank-{rank}.log").read_text()
                assert "no error" not in told
            assert re.search(wanted, told), told
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    with_a_failing_peer(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4])  # type: ignore[arg-type]
