"""Links of a world, and the time of collectives over them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from ...parallel.cp.topology import PRESETS, Fabric, Topology
from ..config import Recipe
from .device import SHEETS

RANKS_OF_A_NODE = 8
"""Most GPUs that are assumed to share a node when no topology is named."""


class Links(NamedTuple):
    """Links of a world: among all its ranks, and among those that share a sequence or hold equal weights."""

    all_ranks: Topology
    data_ranks: Topology


def links_of(recipe: Recipe, world_size: int, topology: Topology) -> Links:
    """Return the links of a world on a topology. Raises ValueError if the topology has fewer ranks."""
    if not topology.covers(world_size):
        raise ValueError(
            f"--gpus {world_size}: topology {topology.name!r} has {topology.ranks_per_node} ranks; name one of several "
            "nodes, such as --topology infiniband"
        )
    return Links(topology, topology.every(recipe.parallel.tensor))


def preset_of(recipe: Recipe, world_size: int, named: str | None = None) -> tuple[str, str]:
    """Return the preset topology of a world whose links nobody has measured, and its origin.

    `named` is the name that --topology gives, if any. Raises ValueError if there is no preset of this name.
    """
    if named is not None and named not in PRESETS:
        raise ValueError(f"--topology {named}: must be one of {', '.join(PRESETS)}")
    if named is not None:
        return named, "--topology"
    if recipe.parallel.cp.topology != "probe":
        return recipe.parallel.cp.topology, "parallel.cp.topology"
    return "nvswitch" if world_size <= RANKS_OF_A_NODE else "infiniband", "assumed"


def assumed_topology(name: str, world_size: int, device: str) -> Topology:
    """Return a preset topology, whose switches between the GPUs of a node have the links of a device's data sheet."""
    topology, sheet = PRESETS[name](world_size), SHEETS.get(device)
    # Ports that several GPUs share are PCIe, and the sheet has NVLink.
    if sheet is None or topology.inside.kind != "switch" or topology.inside.ends_per_port > 1:
        return topology
    return replace(topology, inside=replace(topology.inside, bytes_per_s=sheet.link_bytes_per_s))


def gather_s(topology: Topology, ranks: int, num_bytes: float, share: float) -> float:
    """Return the seconds in which `ranks` ranks gather `num_bytes`, of which each has its part, or reduce-scatter them.

    A rank receives all but its part through its links inside the node, and a node all but its part through its ports.
    Both go on at once, so the longer counts. A sum over all ranks takes two of these.
    """
    if ranks == 1:
        return 0.0
    inside = min(ranks, topology.ranks_per_node)
    nodes = math.ceil(ranks / inside)
    # Parts double with each round of messages, so latency counts log2 times.
    seconds = latency = 0.0
    if inside > 1:
        fabric = topology.inside
        rate = _duplex(fabric) * (inside - 1 if fabric.kind == "mesh" else 1)  # a mesh has a link to each other rank
        seconds = num_bytes * (ranks - 1) / ranks / (rate * share)
        latency = fabric.latency_s * math.log2(inside)
    if nodes > 1:
        fabric = topology.across
        assert fabric is not None, "the topology covers these ranks"
        rate = _duplex(fabric) * inside / fabric.ends_per_port  # of all ports of a node
        seconds = max(seconds, num_bytes * (nodes - 1) / nodes / (rate * share))
        latency += fabric.latency_s * math.log2(nodes)
    return seconds + latency


def _duplex(fabric: Fabric) -> float:
    """Return the bytes/s of a link in one direction while the other carries as much."""
    return fabric.bytes_per_s / (1 if fabric.full_duplex else 2)
