"""Measures what joins the ranks of a process group, and how fast each computes.

A few patterns of messages are timed, small ones for latency and large ones for bandwidth, and `fit` finds the fabric
that explains them: inside nodes, all nodes at once; across, rank i of a node to rank i of another. Then every rank
computes tiles of attention, all at the same time, since ranks may share cores. On two cores 8 ranks take seconds; more
ranks take hardly longer, as the number of patterns does not grow with them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import torch
import torch.distributed as dist

from ...kernels.attention import attention_backward, attention_forward, zeros_fp32
from ...kernels.layout import SeqLayout
from ...kernels.mask import make_mask
from .cost import Speed
from .fit import Fit, Pattern, Timing, fabrics, fit, patterns
from .topology import Fabric, Topology

SMALL_BYTES = 8
LARGE_BYTES = (1 << 18, 1 << 26)
"""Least and most of a large message. Shaped links let some 100 kB pass unshaped; a GPU's memory holds many of 64 MB."""
MESSAGE_S = 0.01
"""Messages are made so large that one takes so long."""
SAMPLE_S = 0.02
"""A sample repeats a pattern for so long, and a pattern has `SAMPLES` of them, of which the fastest
counts: whatever else a machine does makes it slower."""
SAMPLES = 3
TILE_S = 0.02
"""A tile's forward takes so long at least."""


@dataclass(frozen=True)
class Probe:
    """What was measured. The fits stand best first; those of a fabric that is not there are empty."""

    topology: Topology
    speed: Speed
    num_nodes: int
    inside: tuple[Fit, ...]
    across: tuple[Fit, ...]
    seconds: float
    """That the probe took."""

    def to_json(self) -> str:
        """As `from_json` reads it."""
        return json.dumps(asdict(self), indent=1) + "\n"


def from_json(text: str) -> Probe:
    """What `Probe.to_json` wrote."""
    tree = json.loads(text)
    shape, speed = tree["topology"], Speed(**tree["speed"])
    across = Fabric(**shape["across"]) if shape["across"] else None
    topology = Topology(**{**shape, "inside": Fabric(**shape["inside"]), "across": across})
    fits = {side: tuple(Fit(Fabric(**x["fabric"]), x["error"]) for x in tree[side]) for side in ("inside", "across")}
    return Probe(topology, speed, tree["num_nodes"], **fits, seconds=tree["seconds"])


def probe(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Probe:
    """Measure the links between the ranks of `group` (None: all) and their speed at attention with these heads.

    Collective; every rank returns what rank 0 found. Raises ValueError for one rank alone, and for nodes that do not
    have equally many ranks of the group, one node after the other.
    """
    started = time.perf_counter()
    members = dist.get_process_group_ranks(group or dist.group.WORLD)
    per_node = _ranks_per_node(members, group)
    num_nodes = len(members) // per_node
    links = _Links(members, group, device)
    inside = links.measure(0, per_node) if per_node > 1 else []
    across = links.measure(per_node, num_nodes) if num_nodes > 1 else []
    speed = _speed(num_heads, num_kv_heads, head_dim, dtype, device, group, backend)
    # Where every node has one rank, nothing is inside: what is across stands for both.
    fabric = (inside or across)[0].fabric
    topology = Topology("probe", per_node, fabric, across[0].fabric if across else None)
    found = [Probe(topology, speed, num_nodes, tuple(inside), tuple(across), time.perf_counter() - started)]
    dist.broadcast_object_list(found, group=group, group_src=0, device=device)
    return found[0]


def _ranks_per_node(members: Sequence[int], group: dist.ProcessGroup | None) -> int:
    """Ranks of the group on each node, from torchrun's LOCAL_WORLD_SIZE; without torchrun there is one node."""
    told = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    all_told: list[int] = [0] * len(members)
    dist.all_gather_object(all_told, told, group=group)
    if len(members) < 2:
        raise ValueError("topology: one rank alone has no links to measure: start 2 or more, with --ranks")
    if len(set(all_told)) > 1:
        raise ValueError(
            f"topology: nodes have {min(all_told)} to {max(all_told)} ranks (LOCAL_WORLD_SIZE): start equally many on "
            "each node"
        )
    nodes = [rank // told for rank in members]
    per_node = nodes.count(nodes[0])
    if nodes != [nodes[at - at % per_node] for at in range(len(nodes))] or len(set(nodes)) * per_node != len(nodes):
        raise ValueError(
            f"topology: the group's ranks {members} lie unevenly on nodes of {told} ranks: each node must hold equally "
            "many of them, in order"
        )
    return per_node


class _Links:
    """Times patterns of messages. Each direction has a process group of its own, as in `transports`.

    They are kept: torch would give a later group of the same ranks the same name, under which the store still has the
    addresses of the old one.
    """

    def __init__(self, members: Sequence[int], group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.rank, self.size, self.group, self.device = dist.get_rank(group), len(members), group, device
        self.ways: list[dist.ProcessGroup] = []
        for _ in ("up", "down"):
            way = dist.new_group(list(members), use_local_synchronization=True)
            assert isinstance(way, dist.ProcessGroup)
            dist.all_reduce(torch.zeros(1, device=device), group=way)  # makes NCCL's communicator
            self.ways.append(way)

    def measure(self, stride: int, num_places: int) -> list[Fit]:
        """Fits of what joins the ranks of each node (stride 0), or nodes of `stride` ranks. Equal on all ranks."""
        width = max(1, stride)
        first = 0 if stride else self.rank - self.rank % num_places  # all nodes measure at once
        ends = num_places * width
        plans = patterns(num_places, width)
        large_bytes = self._large_bytes(plans[0], first)
        timings = [
            Timing(pattern, self._seconds(pattern, first, SMALL_BYTES), self._seconds(pattern, first, large_bytes))
            for pattern in plans
        ]
        return fit(timings, ends, large_bytes - SMALL_BYTES, fabrics(num_places, width))

    def _large_bytes(self, pattern: Pattern, first: int) -> int:
        num_bytes, most = LARGE_BYTES if self.device.type == "cuda" else (LARGE_BYTES[0], LARGE_BYTES[1] >> 3)
        enough = max(MESSAGE_S, 10 * self._seconds(pattern, first, SMALL_BYTES))
        while num_bytes < most and self._seconds(pattern, first, num_bytes) < enough:
            num_bytes *= 2
        return num_bytes

    def _seconds(self, pattern: Pattern, first: int, num_bytes: int) -> float:
        """Of one round of the pattern, on the slowest rank."""
        [warm] = _slowest(self._samples(pattern, first, num_bytes, 2, 1), self.device, self.group)
        rounds = min(50, max(1, round(SAMPLE_S / warm)))
        return min(_slowest(self._samples(pattern, first, num_bytes, rounds, SAMPLES), self.device, self.group))

    def _samples(self, pattern: Pattern, first: int, num_bytes: int, rounds: int, num_samples: int) -> list[float]:
        """Seconds a round on this rank, `rounds` of them one after the other in each sample."""
        mine: list[tuple[dist.ProcessGroup, bool, int]] = []
        for source, target in pattern.messages:
            source, target = source + first, target + first
            if self.rank in (source, target):
                is_send = source == self.rank
                mine.append((self.ways[int(target < source)], is_send, target if is_send else source))
        mine.sort(key=lambda message: message[1])  # gloo sends when its receiver has said that it waits
        buffers = [torch.zeros(num_bytes, dtype=torch.uint8, device=self.device) for _ in mine]
        samples = []
        for _ in range(num_samples):
            _meet(self.device, self.group)
            started = time.perf_counter()
            for _ in range(rounds):
                works: list[dist.Work] = []
                for way in self.ways:
                    ops = [
                        dist.P2POp(dist.isend if is_send else dist.irecv, buffer, group=of, group_peer=peer)
                        for buffer, (of, is_send, peer) in zip(buffers, mine, strict=True)
                        if of is way
                    ]
                    works += dist.batch_isend_irecv(ops) if ops else []
                for work in works:
                    work.wait()
            _finish(self.device)
            samples.append((time.perf_counter() - started) / rounds)
        return samples


def _speed(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup | None,
    backend: str,
) -> Speed:
    """From a tile that takes `TILE_S`, and one of a sixteenth of its pairs."""

    def flops(num_tokens: int) -> float:
        return 4.0 * head_dim * num_heads * (num_tokens * (num_tokens + 1) // 2)

    def seconds(num_tokens: int, num_samples: int) -> tuple[float, float]:
        mask = make_mask(SeqLayout.contiguous(num_tokens), SeqLayout.contiguous(num_tokens), device=device)
        q = torch.randn(1, num_tokens, num_heads, head_dim, device=device).to(dtype)
        k, v = torch.randn(2, 1, num_tokens, num_kv_heads, head_dim, device=device).to(dtype)
        out, lse = attention_forward(q, k, v, mask, backend=backend)
        into = (zeros_fp32(q), zeros_fp32(k), zeros_fp32(v))

        def forward() -> None:
            attention_forward(q, k, v, mask, backend=backend)

        def backward() -> None:
            attention_backward(out, q, k, v, lse, None, mask, into=into, out=out, backend=backend)

        backward()  # compiles
        times = [[_timed(work, device, group) for _ in range(num_samples)] for work in (forward, backward)]
        return median(_slowest(times[0], device, group)), median(_slowest(times[1], device, group))

    large = 128
    while seconds(large, 1)[0] < TILE_S and large < 1 << 16:
        large *= 2
    small = large // 4
    (forward, backward), (small_forward, small_backward) = seconds(large, SAMPLES), seconds(small, SAMPLES)
    share = flops(small) / flops(large)
    # t = tile_s + flops / rate at both sizes; one tile_s for both passes.
    overheads = [(x - share * y) / (1 - share) for x, y in ((small_forward, forward), (small_backward, backward))]
    tile_s = min(max(0.0, sum(overheads) / 2), 0.5 * min(forward, backward))
    return Speed(flops(large) / (forward - tile_s), 2.5 * flops(large) / (backward - tile_s), tile_s)


def _timed(work: Callable[[], None], device: torch.device, group: dist.ProcessGroup | None) -> float:
    _meet(device, group)
    started = time.perf_counter()
    work()
    _finish(device)
    return time.perf_counter() - started


def _meet(device: torch.device, group: dist.ProcessGroup | None) -> None:
    """All ranks go on together."""
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    _finish(device)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slowest(seconds: Sequence[float], device: torch.device, group: dist.ProcessGroup | None) -> list[float]:
    """The largest of each over all ranks, so that all decide alike."""
    times = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(times, dist.ReduceOp.MAX, group=group)
    return times.tolist()
