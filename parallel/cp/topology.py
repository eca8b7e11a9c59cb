"""Topologies: the links that a message between two ranks takes, with their bandwidth and latency."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

GB = 1e9
Kind = Literal["switch", "mesh", "ring"]
PeerCopies = Literal["auto", "always", "never"]
"""Condition on which a ring takes copies instead of communicators.

| value | rings |
|---|---|
| auto | on GPUs, rings whose ranks all reach each other, unless the GPU has a single queue |
| always | all rings, on CPUs too; refused if two ranks of one do not reach each other |
| never | none |
"""


class Path(NamedTuple):
    """Links that a message takes from one rank to another."""

    links: tuple[Hashable, ...]
    """Names of the links; the message occupies all of them for its whole time."""
    bytes_per_s: float
    """Bandwidth of each of these links."""
    latency_s: float
    """Latency of the whole path."""


@dataclass(frozen=True)
class Fabric:
    """Links of one kind between ends. A link carries `bytes_per_s` in each direction, in both at once if `full_duplex`.

    | kind | links |
    |---|---|
    | `switch` | one port for each end, or one for `ends_per_port` adjacent ends; any port reaches any other |
    | `mesh` | one link between every two ends |
    | `ring` | one link to each neighbour; other messages take the links between, the shorter way round |

    Raises ValueError for another kind, and unless all numbers but the latency are above 0.
    """

    kind: Kind
    bytes_per_s: float
    latency_s: float
    ends_per_port: int = 1
    full_duplex: bool = True

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"fabric: kind = {self.kind!r}: must be one of {', '.join(get_args(Kind))}; name one of these kinds"
            )
        if not (self.bytes_per_s > 0 and self.latency_s >= 0 and self.ends_per_port >= 1):
            raise ValueError(
                f"fabric: bytes_per_s = {self.bytes_per_s}, latency_s = {self.latency_s}, ends_per_port = "
                f"{self.ends_per_port}: must be above 0, at least 0 and at least 1; take those of "
                "`probe` or of a preset"
            )

    def path(self, size: int, source: int, target: int, name: Hashable = None) -> Path:
        """Return the path from one of `size` ends to another; `name` distinguishes the links of two fabrics."""
        if self.kind == "switch":
            port, other = source // self.ends_per_port, target // self.ends_per_port
            # Ends of the same port reach each other without it.
            links = [("out", port), ("in", other)] if port != other else [("pair", source, target)]
        elif self.kind == "mesh":
            links = [("link", source, target)]
        else:
            # The shorter way; forward if both are equally long.
            ahead = (target - source) % size
            hops, step = (ahead, 1) if ahead <= size - ahead else (size - ahead, -1)
            links = [("link", (source + hop * step) % size, (source + (hop + 1) * step) % size) for hop in range(hops)]
        # A ring passes a message on link by link; on other fabrics a path has one latency.
        latency_s = self.latency_s * (len(links) if self.kind == "ring" else 1)
        if not self.full_duplex:
            # One link for both directions, and one port for in and out: the name keeps the ends alone, in order.
            links = [("both ways", *sorted(ends)) for _, *ends in links]
        return Path(tuple((name, *link) for link in links), self.bytes_per_s, latency_s)

    def every(self, stride: int) -> Fabric:
        """Return the fabric between every `stride`-th end; the ends in between take their share of a shared port."""
        # For example with a port for 4 ends and a stride of 2: 2 of every 4 ends are left, and half the port's bytes.
        ends = max(1, self.ends_per_port // stride)
        return replace(self, ends_per_port=ends, bytes_per_s=self.bytes_per_s * ends / self.ends_per_port)


@dataclass(frozen=True)
class Topology:
    """Nodes of `ranks_per_node` ranks, with one fabric inside each node and one across; the ends of both are ranks.

    Raises ValueError if a node has no rank.
    """

    name: str
    ranks_per_node: int
    inside: Fabric
    across: Fabric | None = None
    copies: Fabric | None = None
    """Fabric inside a node for rings that fit into it, whose messages are copies; None: `inside` serves them too."""

    def __post_init__(self) -> None:
        if self.ranks_per_node < 1:
            raise ValueError(
                f"topology {self.name!r}: ranks_per_node = {self.ranks_per_node}: must be at least 1; give the number "
                "of ranks of a node, or all ranks if they are on one"
            )

    def path(self, size: int, source: int, target: int) -> Path:
        """Return the path between two of `size` ranks, which fill one node after the other."""
        # Each node has links of its own, named by its number; `min`: a ring inside a node closes among the ranks used.
        node, per_node = source // self.ranks_per_node, self.ranks_per_node
        if self.across is None or node == target // per_node:
            fabric = self.copies if self.copies and size <= per_node else self.inside
            return fabric.path(min(size, per_node), source % per_node, target % per_node, node)
        return self.across.path(size, source, target, "across")

    @classmethod
    def preset(cls, name: str, num_ranks: int) -> Topology:
        """Return a topology of `num_ranks` ranks by its name: nvswitch, full_mesh, pcie_pairs, infiniband or ethernet.

        Raises ValueError for another name, or for fewer ranks than one.
        """
        if name not in PRESETS:
            raise ValueError(f"topology = {name!r}: is not a preset; name one of {', '.join(PRESETS)}")
        return PRESETS[name](num_ranks)

    def every(self, stride: int) -> Topology:
        """Return the topology between every `stride`-th rank; the ranks in between take their share of a port."""
        return replace(
            self,
            ranks_per_node=max(1, self.ranks_per_node // stride),
            inside=self.inside.every(stride),
            across=self.across and self.across.every(stride),
        )

    def covers(self, size: int) -> bool:
        """Return whether the topology describes `size` ranks: one node, or a fabric across nodes."""
        return self.across is not None or size <= self.ranks_per_node


def nvswitch(num_ranks: int = 8) -> Topology:
    """Return one node of H100s on NVSwitch: 450 GB/s a GPU and direction (NVIDIA's H100 data sheet: 900 both)."""
    return Topology("nvswitch", num_ranks, Fabric("switch", 450 * GB, 10e-6))


def full_mesh(num_ranks: int = 8) -> Topology:
    """Return one node with a link between every two GPUs: 64 GB/s a direction (AMD's MI300X data sheet: 128 both)."""
    return Topology("full mesh", num_ranks, Fabric("mesh", 64 * GB, 10e-6))


def pcie_pairs(num_ranks: int = 8) -> Topology:
    """Return one node where two GPUs share each PCIe 4.0 x16 port: 32 GB/s a direction, as specified."""
    return Topology("pcie pairs", num_ranks, Fabric("switch", 32 * GB, 20e-6, ends_per_port=2))


def infiniband(num_ranks: int, ranks_per_node: int = 8) -> Topology:
    """Return NVSwitch nodes with a 400 Gbit/s InfiniBand port (NDR) for each GPU."""
    inside = Fabric("switch", 450 * GB, 10e-6)
    return Topology("infiniband", min(num_ranks, ranks_per_node), inside, Fabric("switch", 50 * GB, 20e-6))


def ethernet(num_ranks: int, ranks_per_node: int = 8) -> Topology:
    """Return NVSwitch nodes with one 400 Gbit/s port for each node, which its GPUs share."""
    inside, per_node = Fabric("switch", 450 * GB, 10e-6), min(num_ranks, ranks_per_node)
    return Topology("ethernet", per_node, inside, Fabric("switch", 50 * GB, 30e-6, ends_per_port=per_node))


PRESETS = {
    "nvswitch": nvswitch,
    "full_mesh": full_mesh,
    "pcie_pairs": pcie_pairs,
    "infiniband": infiniband,
    "ethernet": ethernet,
}
"""Topologies by name, each made from a number of ranks."""
