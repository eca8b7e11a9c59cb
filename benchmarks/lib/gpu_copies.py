"""Section of copies between the ranks of a node, beside NCCL's or gloo's messages: right, and how fast.

The generator runs on all ranks of a world; rank 0 alone yields rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median

import torch
import torch.distributed as dist
from longring.kernels.layout import SeqLayout
from longring.parallel.cp.attention import context_attention
from longring.parallel.cp.execute import AttentionSpec
from longring.parallel.cp.grid import CpGrid
from longring.parallel.cp.group import CpGroup, open_group
from longring.parallel.cp.layout import zigzag
from longring.parallel.cp.plan import Message
from longring.parallel.cp.transports import between_processes
from longring.parallel.cp.visible import Visibility
from longring.parallel.mesh import Mesh
from longring.parallel.world import World

from .gpu_ranks import MASKS, families, grid_row, joined, largest, make_case, say
from .script import Row, Size

ROUNDS = {"full": 15, "quick": 7, "smallest": 2}
"""Timed rounds, in which process groups and copies take turns; the median counts."""
MESSAGE_BYTES = {"full": (2**10, 2**20, 2**26), "quick": (2**10, 2**20, 2**24), "smallest": (2**10,)}
TOKENS = {"full": 8192, "quick": 1024, "smallest": 32}
"""Tokens of a rank in the timed attention on a GPU; an eighth of it on a CPU."""


def copies_rows(size: Size) -> Iterator[Row]:
    """Yield, for each ring inside a node, times of messages and grids by both transports.

    A message goes from each rank to both neighbours at once. The error of a grid is that of `grid_row`, by copies,
    with every mask; `equal` says whether its results by both transports have the same bits. Collective.
    """
    with joined() as mesh:
        on_node = World.from_environment().local_size
        for degree, members in families(mesh, "smallest").items():
            if degree > on_node:
                return
            made = replace(mesh.communicator_options, peer_copies="always")
            wired = open_group(mesh.neighbours[degree], members, mesh.communicator_options)
            try:
                groups = {"groups": wired, "copies": open_group(mesh.neighbours[degree], members, made)}
            except ValueError as error:
                if mesh.rank == 0:
                    yield {"cp": degree, "of": "copies are not possible", "right": False, "note": str(error)}
                return
            for num_bytes in MESSAGE_BYTES[size]:
                say(mesh, f"messages of {num_bytes} bytes over {degree} ranks")
                yield from message_row(groups, num_bytes, mesh, size)
            cases = {kind: make_case(kind, degree, mesh.device, size) for kind in MASKS}
            for grid in members:
                say(mesh, f"copies, cp {degree}, {grid}")
                checked = grid_row(grid, groups["copies"], cases, mesh)
                ms, equal = attention_ms(grid, groups, mesh, size)
                if mesh.rank == 0:
                    right = checked["right"] and equal
                    yield {"cp": degree, "of": str(grid), **ms, "error": checked["error"], "right": right}


def message_row(groups: Mapping[str, CpGroup], num_bytes: int, mesh: Mesh, size: Size) -> Iterator[Row]:
    """Yield the time of a message to each neighbour and from each at once, by each transport. Collective."""
    count, rank = groups["groups"].size, groups["groups"].rank
    both_ways = {(source, (source + way) % count) for source in range(count) for way in (1, -1)}
    messages = [Message("keys", a, ((0, 1),), a, b, 0, 0) for a, b in sorted(both_ways) if rank in (a, b)]
    buffers = {message: [torch.zeros(num_bytes, dtype=torch.uint8, device=mesh.device)] for message in messages}

    def exchange(group: CpGroup) -> None:
        transport = between_processes(group)
        transport.post(
            {message: buffers[message] for message in messages if message.source == rank},
            {message: buffers[message] for message in messages if message.target == rank},
        )
        for message in messages:
            transport.wait(message)

    ms = {name: largest([found], mesh)[0] for name, found in in_turns(exchange, groups, mesh, size).items()}
    if mesh.rank == 0:
        yield {"cp": count, "of": f"{num_bytes:,} bytes to each neighbour", **{f"{x}_ms": ms[x] for x in ms}}


def attention_ms(grid: CpGrid, groups: Mapping[str, CpGroup], mesh: Mesh, size: Size) -> tuple[Row, bool]:
    """Return the ms of a forward and backward by each transport, and whether their bits are equal. Collective."""
    tokens = TOKENS[size] if mesh.device.type == "cuda" else TOKENS[size] // 8
    layouts = tuple(SeqLayout(zigzag(tokens * grid.size, rank, grid.size).runs, (0,)) for rank in range(grid.size))
    spec = AttentionSpec(grid, layouts, Visibility())
    heads = max(8, grid.size)
    x = torch.randn((4, 1, tokens, heads, 64), generator=torch.Generator().manual_seed(mesh.rank))
    q, k, v, dout = x.to(mesh.device, torch.bfloat16)
    leaves = [y.requires_grad_() for y in (q, k, v)]
    results: dict[int, Sequence[torch.Tensor]] = {}

    def both_passes(group: CpGroup) -> None:
        out = context_attention(leaves[0], leaves[1], leaves[2], spec, group)
        results[id(group)] = (out.detach(), *torch.autograd.grad(out, leaves, dout))

    times = in_turns(both_passes, groups, mesh, size)
    first, second = results.values()
    differs = float(not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)))
    [groups_ms, copies_ms, differs] = largest([times["groups"], times["copies"], differs], mesh)
    return {"groups_ms": groups_ms, "copies_ms": copies_ms}, not differs


def in_turns(work, groups: Mapping[str, CpGroup], mesh: Mesh, size: Size) -> dict[str, float]:
    """Return this rank's median ms of a work over each group, in turns after one that warms up. Collective."""
    times: dict[str, list[float]] = {name: [] for name in groups}
    for _ in range(1 + ROUNDS[size]):
        for name, group in groups.items():
            dist.barrier()
            started = time.perf_counter()
            work(group)
            if mesh.device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: median(found[1:]) for name, found in times.items()}
