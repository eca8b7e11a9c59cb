"""Probe: measures the links between the ranks of a process group, and the speed of attention on a rank.

A few patterns of messages are timed, small messages for latency and large ones for bandwidth, and `fit` finds the
fabric that explains the times: inside nodes, on all nodes at once, and across nodes, rank i of a node with rank i of
another. Then all ranks compute tiles of attention at the same time, since ranks may share cores. 8 ranks on two cores
take seconds; the number of patterns does not grow with the ranks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median

import torch
import torch.distributed as dist

from ...kernels.attention import attention_backward, attention_forward, zeros_fp32
from ...kernels.layout import SeqLayout
from ...kernels.mask import make_mask
from ..world import World
from .copies import SlotLayout
from .cost import Speed
from .fit import Fit, Pattern, Timing, fabrics, fit, patterns
from .group import CommunicatorOptions, CpGroup, open_channel
from .plan import Channel, Link, Message
from .reach import open_copies, sizes_in_reach
from .topology import Fabric, Topology
from .transports import between_processes

SMALL_BYTES = 8
LARGE_BYTES = (1 << 18, 1 << 26)
"""Smallest and largest size of a large message. Shaped links let some 100 kB pass unshaped; many messages of 64 MB fit
into the memory of a GPU."""
MESSAGE_S = 0.01
"""Time in seconds that a large message should take; its size is doubled until it does."""
SAMPLE_S = 0.02
"""Time in seconds for which a sample repeats a pattern."""
SAMPLES = 3
"""Samples of a pattern. The fastest counts, since all other load makes a sample slower."""
TILE_S = 0.02
"""Time in seconds that the forward of the large tile takes at least."""


@dataclass(frozen=True)
class Probe:
    """Result of a probe. Fits are ordered by error; a fabric that does not exist (inside or across) has none."""

    topology: Topology
    speed: Speed
    num_nodes: int
    inside: tuple[Fit, ...]
    across: tuple[Fit, ...]
    seconds: float
    """Duration of the probe."""
    copies: tuple[Fit, ...] = ()
    """Fits inside nodes of messages that are copies; none if the ranks of a node do not take them."""

    def to_json(self) -> str:
        """Return the probe as JSON, which `from_json` reads."""
        return json.dumps(asdict(self), indent=1) + "\n"


def from_json(text: str) -> Probe:
    """Return the probe that `Probe.to_json` wrote."""
    tree = json.loads(text)
    shape, speed = tree["topology"], Speed(**tree["speed"])
    sides = ("inside", "across", "copies")
    topology = Topology(**{**shape, **{side: Fabric(**shape[side]) for side in sides if shape.get(side)}})
    fits = {side: tuple(Fit(Fabric(**x["fabric"]), x["error"]) for x in tree.get(side, ())) for side in sides}
    return Probe(topology, speed, tree["num_nodes"], seconds=tree["seconds"], **fits)


def probe(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    options: CommunicatorOptions | None = None,
) -> Probe:
    """Measure the links between the ranks of `group` (None: all) and their speed of attention. Collective.

    Every rank returns the result of rank 0. `options` are those of training's communicators. torchrun's variables must
    be set. Raises ValueError on all ranks if one of them is not, if there is only one rank, if nodes do not have
    equally many ranks of the group, in order, or if the ranks of a node cannot open their copies.
    """
    started = time.perf_counter()
    members = dist.get_process_group_ranks(group or dist.group.WORLD)
    per_node = _ranks_per_node(members, group)
    num_nodes = len(members) // per_node
    links = _Links(members, per_node, group, device, options or CommunicatorOptions())
    inside = links.measure(links.wired, 0, per_node) if per_node > 1 else []
    across = links.measure(links.wired, per_node, num_nodes) if num_nodes > 1 else []
    copies = links.measure(links.copied, 0, per_node) if links.copied else []
    speed = attention_speed(num_heads, num_kv_heads, head_dim, dtype, device, group, backend)
    # With one rank a node there is no fabric inside; the one across stands for both.
    fabric = (inside or across)[0].fabric
    topology = Topology(
        "probe", per_node, fabric, across[0].fabric if across else None, copies[0].fabric if copies else None
    )
    seconds = time.perf_counter() - started
    found = [Probe(topology, speed, num_nodes, tuple(inside), tuple(across), seconds, tuple(copies))]
    dist.broadcast_object_list(found, group=group, group_src=0, device=device)
    return found[0]


def _ranks_per_node(members: Sequence[int], group: dist.ProcessGroup | None) -> int:
    """Return the ranks of the group on each node.

    Collective. Raises ValueError on all ranks as `probe` does.
    """
    local_size = World.from_environment().local_size
    local_sizes: list[int] = [0] * len(members)
    # Gathered before any check, so that all ranks raise the same error.
    dist.all_gather_object(local_sizes, local_size, group=group)
    if len(members) < 2:
        raise ValueError("topology: one rank alone has no links to measure; start 2 ranks or more")
    if len(set(local_sizes)) > 1:
        raise ValueError(
            f"topology: nodes have {min(local_sizes)} to {max(local_sizes)} ranks (LOCAL_WORLD_SIZE); start "
            "equally many on each node"
        )
    # Node of each member: in order, they must read 0, 0, ..., 1, 1, ... with the same count of each.
    nodes = [rank // local_size for rank in members]
    per_node = nodes.count(nodes[0])
    if nodes != [nodes[at - at % per_node] for at in range(len(nodes))] or len(set(nodes)) * per_node != len(nodes):
        raise ValueError(
            f"topology: the ranks {members} of the group lie unevenly on nodes of {local_size} ranks; use "
            "equally many of each node, in order"
        )
    return per_node


class _Links:
    """Timer of patterns of messages, over the transports that a run uses.

    The process groups are never destroyed: torch would give a later group of the same ranks the same name, under which
    the store still has the addresses of the old one.
    """

    def __init__(
        self,
        members: Sequence[int],
        per_node: int,
        group: dist.ProcessGroup | None,
        device: torch.device,
        options: CommunicatorOptions,
    ) -> None:
        self.rank, self.group, self.device = dist.get_rank(group), group, device
        down, up = (open_channel(members, f"probe {way}", device, options) for way in ("down", "up"))
        channels: dict[Channel, dist.ProcessGroup] = {("keys", "down"): down, ("keys", "up"): up}
        self.wired = CpGroup(self.rank, tuple(members), channels)
        """The members, joined by process groups."""
        self.copied: CpGroup | None = None
        """The members, with copies between those of a node."""
        first = self.rank - self.rank % per_node  # first rank of this node
        node = tuple(members)[first : first + per_node]
        if per_node > 1 and sizes_in_reach([per_node], members, options.peer_copies, device, down):
            links: set[Link] = {(("keys", "up" if b > a else "down"), a, b) for a in node for b in node if a != b}
            of_node = open_channel(node, "probe copies", device, options)
            layout = SlotLayout(frozenset(links), options.slot_bytes)
            copies = open_copies(
                layout, node, of_node, device, options.timeout, high_priority=options.high_priority, waiting=down
            )
            self.copied = replace(self.wired, copies=copies)

    def measure(self, group: CpGroup, stride: int, num_sites: int) -> list[Fit]:
        """Return the fits for `num_sites` ranks of each node (stride 0), or nodes of `stride` ranks. Collective.

        The result is the same on all ranks.
        """
        width = max(1, stride)
        first = 0 if stride else self.rank - self.rank % num_sites  # all nodes measure at once
        ends = num_sites * width
        to_time = patterns(num_sites, width)
        large_bytes = self._large_bytes(group, to_time[0], first)
        timings = [
            Timing(pattern, *(self._seconds(group, pattern, first, size) for size in (SMALL_BYTES, large_bytes)))
            for pattern in to_time
        ]
        return fit(timings, ends, large_bytes - SMALL_BYTES, fabrics(num_sites, width))

    def _large_bytes(self, group: CpGroup, pattern: Pattern, first: int) -> int:
        """Return the bytes of a message that takes at least `MESSAGE_S` and ten times as long as a small one.

        Collective. It is at most the larger of `LARGE_BYTES`, or on CPUs an eighth of that, however fast the links are.
        """
        num_bytes, most = LARGE_BYTES if self.device.type == "cuda" else (LARGE_BYTES[0], LARGE_BYTES[1] >> 3)
        enough = max(MESSAGE_S, 10 * self._seconds(group, pattern, first, SMALL_BYTES))
        while num_bytes < most and self._seconds(group, pattern, first, num_bytes) < enough:
            num_bytes *= 2
        return num_bytes

    def _seconds(self, group: CpGroup, pattern: Pattern, first: int, num_bytes: int) -> float:
        """Return the seconds of one round of the pattern on the slowest rank, the fastest of `SAMPLES` samples.

        Collective.
        """
        # Two rounds open the connections and show how many rounds fill `SAMPLE_S`.
        messages = [
            Message("keys", source, ((0, 1),), first + source, first + target, 0, 0)
            for source, target in pattern.messages
        ]
        [warm] = _slowest(self._samples(group, messages, num_bytes, 2, 1), self.device, self.group)
        rounds = min(50, max(1, round(SAMPLE_S / warm)))  # equal on all ranks, as `warm` is
        return min(_slowest(self._samples(group, messages, num_bytes, rounds, SAMPLES), self.device, self.group))

    def _samples(
        self, group: CpGroup, messages: Sequence[Message], num_bytes: int, rounds: int, num_samples: int
    ) -> list[float]:
        """Return this rank's seconds a round for each sample; a sample is `rounds` rounds in sequence. Collective."""
        mine = [message for message in messages if self.rank in (message.source, message.target)]
        buffers = {message: [torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)] for message in mine}
        sends = {message: buffers[message] for message in mine if message.source == self.rank}
        receives = {message: buffers[message] for message in mine if message.target == self.rank}
        transport = between_processes(group)
        samples = []
        for _ in range(num_samples):
            _meet(self.device, self.group)
            started = time.perf_counter()
            for _ in range(rounds):
                transport.post(sends, receives)
                for message in mine:
                    transport.wait(message)
            _finish(self.device)
            samples.append((time.perf_counter() - started) / rounds)
        return samples


def attention_speed(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Speed:
    """Return the speed of attention, from a tile that takes `TILE_S` and one with a sixteenth of its pairs. Collective.

    All ranks compute at once, and the slowest counts.
    """

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
            # Any dout of this shape serves.
            attention_backward(out, q, k, v, lse, None, mask, into=into, out=out, backend=backend)

        backward()  # compiles
        times = [[_timed(run, device, group) for _ in range(num_samples)] for run in (forward, backward)]
        return median(_slowest(times[0], device, group)), median(_slowest(times[1], device, group))

    large = 128
    # The time is that of the slowest rank, so that all ranks double equally often.
    while seconds(large, 1)[0] < TILE_S and large < 1 << 16:
        large *= 2
    small = large // 4
    (forward, backward), (small_forward, small_backward) = seconds(large, SAMPLES), seconds(small, SAMPLES)
    ratio = flops(small) / flops(large)
    # Solve t = tile_s + flops / rate for both sizes; tile_s is the mean of both passes, at most half of a large tile.
    overheads = [(x - ratio * y) / (1 - ratio) for x, y in ((small_forward, forward), (small_backward, backward))]
    tile_s = min(max(0.0, sum(overheads) / 2), 0.5 * min(forward, backward))
    # The backward has 10 FLOPs for 4 of the forward.
    return Speed(flops(large) / (forward - tile_s), 2.5 * flops(large) / (backward - tile_s), tile_s)


def _timed(run: Callable[[], None], device: torch.device, group: dist.ProcessGroup | None) -> float:
    """Return the seconds of `run` on this rank; all ranks start together. Collective."""
    _meet(device, group)
    started = time.perf_counter()
    run()
    _finish(device)
    return time.perf_counter() - started


def _meet(device: torch.device, group: dist.ProcessGroup | None) -> None:
    """Wait for all ranks. Collective."""
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    _finish(device)


def _finish(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slowest(seconds: Sequence[float], device: torch.device, group: dist.ProcessGroup | None) -> list[float]:
    """Return the largest of each time over all ranks, so that all ranks decide alike. Collective."""
    times = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(times, dist.ReduceOp.MAX, group=group)
    return times.tolist()
