"""Sections of several ranks: every grid against one rank, and the memory of communicators.

Each generator runs on all ranks of a world; rank 0 alone yields rows.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from longring.kernels.layout import SeqLayout
from longring.launch.build import bucket_layouts
from longring.launch.config import Recipe, load_recipe
from longring.launch.grids.decide import decide_grids
from longring.parallel.config import CpConfig, ParallelConfig
from longring.parallel.cp.attention import context_attention
from longring.parallel.cp.execute import AttentionSpec
from longring.parallel.cp.grid import NAMED, CpGrid, divisions, grids
from longring.parallel.cp.group import CpGroup, open_rings
from longring.parallel.cp.layout import zigzag
from longring.parallel.cp.topology import PeerCopies
from longring.parallel.cp.visible import Visibility
from longring.parallel.mesh import Mesh, join
from longring.parallel.world import World
from torch import Tensor

from .definition import NAMES, by_definition, error_ratio, visible
from .gpu_training import RECIPE
from .script import Row, Size
from .sections import limit_s

WHOLE_FAMILY = 8
"""Number of ranks up to which every member of the family runs; over more, its divisions and named members."""
MASKS = ("causal", "documents", "window")


@contextmanager
def joined(peer_copies: PeerCopies = "never") -> Iterator[Mesh]:
    """Join the ranks of a section, and leave them at the end unless they had joined before. Collective.

    Messages go over NCCL or gloo alone, unless `peer_copies` says otherwise.
    """
    own, world = not dist.is_initialized(), World.from_environment()
    parallel = ParallelConfig(tokens_per_rank=1, cp=CpConfig(peer_copies=peer_copies))
    mesh = join(parallel, largest_ring(world.size), timeout_minutes=limit_s() / 60)
    torch.manual_seed(0)
    yield mesh
    if own:
        dist.destroy_process_group()


def largest_ring(ranks: int) -> int:
    """Return the largest power of two that divides a number of ranks."""
    return ranks & -ranks


def family(degree: int, heads: int, kv_heads: int, size: Size) -> list[CpGrid]:
    """Return the members over `degree` ranks that run, the named ones first."""
    named = [make(degree) for make in NAMED.values()]
    whole = grids(degree) if size != "smallest" and degree <= WHOLE_FAMILY else divisions(degree)
    found = dict.fromkeys([*named, *whole])
    return [grid for grid in found if grid.unfit(heads, kv_heads) is None]


def num_heads(degree: int) -> int:
    """Return the query heads of a case, of which each two share keys: enough for most grids over `degree` ranks."""
    return min(16, max(8, degree))


def families(mesh: Mesh, size: Size) -> dict[int, list[CpGrid]]:
    """Return the members that run over each number of ranks above 1."""
    return {
        degree: family(degree, num_heads(degree), num_heads(degree) // 2, size)
        for degree in mesh.neighbours
        if degree > 1
    }


def open_groups(mesh: Mesh, members: Mapping[int, list[CpGrid]]) -> dict[int, CpGroup]:
    """Return the groups of some grids, opened as a run opens them. Collective."""
    found = [grid for grids_of_degree in members.values() for grid in grids_of_degree]
    return open_rings(mesh.neighbours, found, mesh.communicator_options)


def order_rows(size: Size) -> Iterator[Row]:
    """Yield a row for each grid: its worst error over what plain PyTorch's allows, or nothing if it hangs. Collective.

    Forward and backward run with every mask of `MASKS`; each rank compares its rows with attention by its definition,
    which it computes alone.
    """
    with joined() as mesh:
        members = families(mesh, size)
        groups = open_groups(mesh, members)
        for degree, group in groups.items():
            cases = {kind: make_case(kind, degree, mesh.device, size) for kind in MASKS}
            for grid in members[degree]:
                say(mesh, f"cp {degree}, {grid}")
                row = grid_row(grid, group, cases, mesh)
                if mesh.rank == 0:
                    yield row


class OrderCase(NamedTuple):
    """One attention and its results by definition, equal on every rank."""

    layout: SeqLayout
    window: int | None
    tensors: tuple[Tensor, ...]
    """q, k, v and dout [1, s, heads or kv_heads, d]."""
    exact: dict[str, Tensor]
    plain: dict[str, Tensor]


def make_case(kind: str, degree: int, device: torch.device, size: Size) -> OrderCase:
    """Return the case of a mask for `degree` ranks."""
    per_rank, head_dim = (32, 16) if size == "smallest" else (64, 32) if device.type == "cpu" else (160, 64)
    per_rank = max(4, min(per_rank, 2048 // degree))  # so that all pairs of a sequence fit the memory in fp64
    tokens = degree * per_rank - 5  # cut into chunks that differ by a token
    draw = random.Random(degree)
    starts = (0, *sorted(draw.sample(range(1, tokens), 5))) if kind == "documents" else (0,)
    window = tokens // 3 if kind == "window" else None
    generator = torch.Generator().manual_seed(degree)
    tensors = tuple(
        torch.randn((1, tokens, count, head_dim), generator=generator).to(device, torch.bfloat16)
        for count in (num_heads(degree), num_heads(degree) // 2, num_heads(degree) // 2, num_heads(degree))
    )
    seen = visible(tokens, starts, window, device)
    exact, plain = (by_definition(tensors, seen, dtype) for dtype in (torch.float64, torch.bfloat16))
    return OrderCase(SeqLayout(((0, tokens),), starts), window, tensors, exact, plain)


def grid_row(grid: CpGrid, group: CpGroup, cases: Mapping[str, OrderCase], mesh: Mesh) -> Row:
    """Return the row of a grid, equal on all ranks: every replica runs it, and the worst error of all counts.

    Collective.
    """
    started = time.perf_counter()
    found: list[tuple[float, str]] = []
    for kind, case in cases.items():
        tokens, starts = case.layout.num_tokens, case.layout.document_starts
        layouts = tuple(SeqLayout(zigzag(tokens, rank, group.size).runs, starts) for rank in range(group.size))
        spec = AttentionSpec(grid, layouts, Visibility(window=case.window))
        rows = layouts[group.rank].positions(mesh.device)
        q, k, v, dout = (x[:, rows] for x in case.tensors)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = context_attention(leaves[0], leaves[1], leaves[2], spec, group)
        got = (out.detach(), *torch.autograd.grad(out, leaves, dout))
        ratio, name = error_ratio(dict(zip(NAMES, got, strict=True)), case.plain, case.exact, rows)
        found.append((ratio, f"{name}, {kind}, rank {mesh.rank}"))
    ms = 1e3 * (time.perf_counter() - started)
    gathered: list[tuple[float, str]] = [(0.0, "")] * mesh.world_size
    dist.all_gather_object(gathered, max(found))
    worst, where = max(gathered)
    return {"cp": group.size, "grid": str(grid), "error": worst, "of": where, "ms": ms, "right": worst <= 1}


def guard_rows(size: Size, peer_copies: PeerCopies = "never") -> Iterator[Row]:
    """Yield a row for each named schedule: whether the guards that run before the first step let it pass. Collective.

    With "auto" the links are probed and the cheapest grid is taken.
    """
    with joined(peer_copies) as mesh, tempfile.TemporaryDirectory() as directory:
        for schedule in ("auto", "token_ring") if size == "smallest" else ("auto", *NAMED):
            say(mesh, f"guards of {schedule}")
            recipe = guard_recipe(schedule, mesh, directory)
            lengths = [128 * max(mesh.neighbours)]
            chosen, note = "", ""
            try:
                found = decide_grids(recipe, mesh, lengths)
                bucket_layouts(recipe, mesh, lengths, found)
                chosen = "; ".join(dict.fromkeys(map(str, found.values())))
            except ValueError as error:
                note = str(error)
            if mesh.rank == 0:
                yield {"schedule": schedule, "grids": chosen, "right": not note, "note": note}


def guard_recipe(schedule: str, mesh: Mesh, directory: str) -> Recipe:
    """Return the demo's recipe over the ranks of a mesh, in bf16, with a schedule and a run directory."""
    largest_bucket = 128 * max(mesh.neighbours)
    settings = [
        *("model.num_heads=8", "model.num_kv_heads=4", "train.dtype=bfloat16", f"parallel.cp.schedule={schedule}"),
        *("parallel.tokens_per_rank=128", f"data.max_bucket_tokens={largest_bucket}"),
        *(f"train.global_batch_tokens={128 * mesh.world_size}", f"run_directory={directory}"),
    ]
    return load_recipe(RECIPE, settings)


def memory_rows(size: Size) -> Iterator[Row]:
    """Yield the memory after each stage, on the rank where it is largest. Collective.

    On a GPU it is the memory of the device outside torch's allocator, which is that of communicators, kernels and the
    context; on a CPU that of the process.
    """
    with joined() as mesh:
        members = families(mesh, "smallest")
        yield from memory_row("ranks joined", mesh)
        groups = open_groups(mesh, members)
        yield from memory_row(f"{len(communicators(groups))} communicators opened and connected", mesh)
        for degree, group in groups.items():
            case = make_case("causal", degree, mesh.device, size)
            for grid in members[degree]:
                say(mesh, f"cp {degree}, {grid}")
                grid_row(grid, group, {"causal": case}, mesh)
            yield from memory_row(f"attention over {degree} ranks", mesh)


def communicators(groups: Mapping[int, CpGroup]) -> set[dist.ProcessGroup]:
    """Return the process groups behind the channels of some groups."""
    return {made for group in groups.values() for made in group.channels.values()}


def memory_row(stage: str, mesh: Mesh) -> Iterator[Row]:
    """Yield the row of a stage on rank 0. Collective."""
    [held] = largest([held_bytes(mesh.device) / 2**20], mesh)
    if mesh.rank == 0:
        yield {"after": stage, "MiB": held}


def held_bytes(device: torch.device) -> int:
    """Return the bytes of this GPU outside torch's allocator, of all its processes; on a CPU this process's bytes."""
    dist.barrier()
    if device.type == "cpu":
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def largest(values: list[float], mesh: Mesh) -> list[float]:
    """Return the largest of each value over all ranks. Collective."""
    found = torch.tensor(values, dtype=torch.float64, device=mesh.device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def say(mesh: Mesh, text: str) -> None:
    """Print what comes next, the last line of the log if it hangs."""
    print(f"rank {mesh.rank}: {text}", flush=True)
