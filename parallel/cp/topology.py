"""What ranks are joined by: which links a message occupies, how fast they are, and how soon it begins to arrive."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, NamedTuple

GB = 1e9


class Path(NamedTuple):
    """What a message from one rank to another occupies."""

    links: tuple[Hashable, ...]
    """Every one is occupied for as long as the message takes."""
    bytes_per_s: float
    """Of each of these links."""
    latency_s: float


@dataclass(frozen=True)
class Fabric:
    """Ends joined alike. Links carry `bytes_per_s` in each direction, at the same time if `full_duplex`.

    | kind | links |
    |---|---|
    | `switch` | one port for each end, or for `ends_per_port` neighbours together; any port reaches any other |
    | `mesh` | one link between every two ends |
    | `ring` | one link to each neighbour; messages to others pass through those between, the shorter way |
    """

    kind: Literal["switch", "mesh", "ring"]
    bytes_per_s: float
    latency_s: float
    ends_per_port: int = 1
    full_duplex: bool = True

    def path(self, size: int, source: int, target: int, name: Hashable = None) -> Path:
        """From one of `size` ends to another; `name` tells the links of this fabric from those of another."""
        if self.kind == "switch":
            port, other = source // self.ends_per_port, target // self.ends_per_port
            # Behind one port they reach each other without it.
            links = [("out", port), ("in", other)] if port != other else [("pair", source, target)]
        elif self.kind == "mesh":
            links = [("link", source, target)]
        else:
            ahead = (target - source) % size
            hops, step = (ahead, 1) if ahead <= size - ahead else (size - ahead, -1)
            links = [("link", (source + hop * step) % size, (source + (hop + 1) * step) % size) for hop in range(hops)]
        latency_s = self.latency_s * (len(links) if self.kind == "ring" else 1)
        if not self.full_duplex:
            links = [("both ways", *sorted(ends)) for _, *ends in links]
        return Path(tuple((name, *link) for link in links), self.bytes_per_s, latency_s)


@dataclass(frozen=True)
class Topology:
    """Nodes of `ranks_per_node` ranks, joined inside by one fabric and across by another, whose ends are the ranks."""

    name: str
    ranks_per_node: int
    inside: Fabric
    across: Fabric | None = None

    def path(self, size: int, source: int, target: int) -> Path:
        """What a message between two of `size` ranks occupies; ranks fill one node after the other."""
        node, per_node = source // self.ranks_per_node, self.ranks_per_node
        if self.across is None or node == target // per_node:
            return self.inside.path(min(size, per_node), source % per_node, target % per_node, node)
        return self.across.path(size, source, target, "across")

    def fits(self, size: int) -> bool:
        """Whether it says how `size` ranks are joined."""
        return self.across is not None or size <= self.ranks_per_node


def nvswitch(num_ranks: int = 8) -> Topology:
    """One node of H100s on NVSwitch: 450 GB/s for each GPU and direction (NVIDIA's H100 data sheet: 900 both)."""
    return Topology("nvswitch", num_ranks, Fabric("switch", 450 * GB, 10e-6))


def full_mesh(num_ranks: int = 8) -> Topology:
    """One node with a link between every two GPUs: 64 GB/s each way (AMD's MI300X data sheet: 128 both)."""
    return Topology("full mesh", num_ranks, Fabric("mesh", 64 * GB, 10e-6))


def pcie_pairs(num_ranks: int = 8) -> Topology:
    """One node where two GPUs share each PCIe 4.0 x16 port: 32 GB/s each way by its specification."""
    return Topology("pcie pairs", num_ranks, Fabric("switch", 32 * GB, 20e-6, ends_per_port=2))


def infiniband(num_ranks: int, ranks_per_node: int = 8) -> Topology:
    """NVSwitch nodes with a 400 Gbit/s InfiniBand port for each GPU (NDR)."""
    inside = Fabric("switch", 450 * GB, 10e-6)
    return Topology("infiniband", min(num_ranks, ranks_per_node), inside, Fabric("switch", 50 * GB, 20e-6))


def ethernet(num_ranks: int, ranks_per_node: int = 8) -> Topology:
    """NVSwitch nodes with one 400 Gbit/s port for each node, which its GPUs share."""
    inside, per_node = Fabric("switch", 450 * GB, 10e-6), min(num_ranks, ranks_per_node)
    return Topology("ethernet", per_node, inside, Fabric("switch", 50 * GB, 30e-6, ends_per_port=per_node))


PRESETS = {
    "nvswitch": nvswitch,
    "full_mesh": full_mesh,
    "pcie_pairs": pcie_pairs,
    "infiniband": infiniband,
    "ethernet": ethernet,
}
