"""Sections of the links: the bandwidth of each channel, and the share of communication that compute covers.

Each generator runs on all ranks of a world; rank 0 alone yields rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from longring.kernels.layout import SeqLayout
from longring.parallel.cp.attention import context_attention
from longring.parallel.cp.execute import AttentionSpec
from longring.parallel.cp.grid import NAMED, CpGrid
from longring.parallel.cp.group import CpGroup, open_group
from longring.parallel.cp.layout import zigzag
from longring.parallel.cp.visible import Visibility
from longring.parallel.mesh import Mesh
from longring.parallel.world import World
from torch.profiler import ProfilerActivity, profile

from .gpu_ranks import families, joined, largest, largest_ring, open_groups, say
from .script import Row, Size
from .trace import covered, kind_of, length

ROUNDS = 5
"""Timed rounds of a pattern, after one that connects; the fastest counts."""


def channel_rows(size: Size) -> Iterator[Row]:
    """Yield the bandwidth of each channel of the largest ring, alone and all at once. Collective.

    Every rank sends to its neighbour and receives from the other: GB/s are those of one direction of one rank. If the
    ring spans nodes, the largest one inside a node follows, over the same communicators, as a run has it, and over
    communicators of its own, for which no link across nodes counts.
    """
    with joined() as mesh:
        degree, inside = max(mesh.neighbours), largest_ring(World.from_environment().local_size)
        members = families(mesh, "smallest")
        groups = open_groups(mesh, {size: members[size] for size in {inside, degree} - {1}})
        yield from ring_rows(groups[degree], degree, size, mesh)
        if 1 < inside < degree:
            alone = open_group(mesh.neighbours[inside], members[inside], mesh.communicator_options)
            yield from ring_rows(groups[inside], degree, size, mesh)
            yield from ring_rows(alone, inside, size, mesh)


def ring_rows(group: CpGroup, over: int, size: Size, mesh: Mesh) -> Iterator[Row]:
    """Yield the bandwidth of each channel of a ring whose communicators reach over `over` ranks. Collective."""
    num_bytes = {"full": 2**26, "quick": 2**22, "smallest": 2**16}[size]
    buffers = {channel: torch.zeros(2, num_bytes, dtype=torch.uint8, device=mesh.device) for channel in group.channels}
    names = sorted(group.channels)
    for chosen in [*([name] for name in names), names]:
        label = " ".join(chosen[0]) if len(chosen) == 1 else "all channels at once"
        say(mesh, f"ring of {group.size}, communicators of {over}: {label}")
        [ms] = largest([1e3 * fastest(group, chosen, buffers, mesh)], mesh)
        if mesh.rank == 0:
            yield {
                **{"channel": label, "ring": group.size, "communicators_over": over, "MiB": num_bytes / 2**20},
                **{"ms": ms, "GB_per_s": len(chosen) * num_bytes / ms / 1e6},
            }


def fastest(group: CpGroup, channels: Sequence[Any], buffers: dict[Any, torch.Tensor], mesh: Mesh) -> float:
    """Return the seconds of one message on each channel at once, to one neighbour and from the other. Collective."""
    times = []
    for _ in range(1 + ROUNDS):
        dist.barrier()
        started = time.perf_counter()
        works: list[dist.Work] = []
        for channel in channels:  # sorted, so that all ranks begin their batches in one order
            step = 1 if channel[1] == "up" else -1
            to, source = (group.global_ranks[(group.rank + away) % group.size] for away in (step, -step))
            receive = dist.P2POp(dist.irecv, buffers[channel][0], source, group.channels[channel])
            send = dist.P2POp(dist.isend, buffers[channel][1], to, group.channels[channel])
            works += dist.batch_isend_irecv([receive, send])
        for work in works:
            work.wait()
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def overlap_rows(size: Size) -> Iterator[Row]:
    """Yield the share of communication time that compute covers, for each named grid of the largest ring. Collective.

    One forward and backward is profiled after one that compiles. The time of a communication kernel includes its wait
    for the other rank. The worst rank counts.
    """
    per_rank, heads, head_dim = {"full": (8192, 32, 128), "quick": (512, 8, 64), "smallest": (64, 8, 16)}[size]
    with joined() as mesh:
        degree = max(mesh.neighbours)
        named = {name: make(degree) for name, make in NAMED.items()}
        members = {name: grid for name, grid in named.items() if grid.unfit(heads, heads // 4) is None}
        group = open_group(mesh.neighbours[degree], members.values(), mesh.communicator_options)
        for name, grid in members.items():
            say(mesh, name)
            shape = (1, per_rank, heads, head_dim)
            busy, total, share = profiled(grid, group, shape, mesh)
            busy, total, minus_share = largest([busy, total, -share], mesh)
            if mesh.rank == 0:
                yield {
                    **{"grid": name, "ranks": degree, "tokens_a_rank": per_rank},
                    **{"compute_ms": busy, "communication_ms": total, "covered": -minus_share},
                }


def profiled(grid: CpGrid, group: CpGroup, shape: tuple[int, ...], mesh: Mesh) -> tuple[float, float, float]:
    """Return ms of compute, ms of communication and its covered share in a forward and backward. Collective."""
    batch, tokens, heads, head_dim = shape
    layouts = tuple(zigzag(tokens * group.size, rank, group.size) for rank in range(group.size))
    spec = AttentionSpec(grid, tuple(SeqLayout(x.runs, (0,)) for x in layouts), Visibility())
    q, k, v, dout = (
        torch.randn((batch, tokens, count, head_dim), device=mesh.device).to(torch.bfloat16)
        for count in (heads, heads // 4, heads // 4, heads)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def both_passes() -> None:
        out = context_attention(leaves[0], leaves[1], leaves[2], spec, group)
        torch.autograd.grad(out, leaves, dout)
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()

    both_passes()
    dist.barrier()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if mesh.device.type == "cuda" else [])]
    with profile(activities=activities) as found:
        both_passes()
    device = torch.autograd.DeviceType.CUDA if mesh.device.type == "cuda" else torch.autograd.DeviceType.CPU  # type: ignore[attr-defined]
    events = [event for event in found.events() or () if event.device_type == device and not event.is_user_annotation]
    of_messages, of_compute = [], []
    for event in events:
        if (kind := kind_of(event.name, mesh.device.type)) is not None:
            chosen = of_messages if kind == "communication" else of_compute
            chosen.append((event.time_range.start / 1e3, event.time_range.end / 1e3))
    return length(of_compute), length(of_messages), covered(of_messages, of_compute)
