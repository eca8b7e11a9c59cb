"""The topology and the speed with which grids are priced: named by the recipe, or measured by a probe."""

from __future__ import annotations

import logging

import torch

from ...parallel.cp.cost import Speed
from ...parallel.cp.probe import probe
from ...parallel.cp.speeds import speed_of
from ...parallel.cp.topology import PRESETS, Topology
from ...parallel.mesh import Mesh
from ..config import Recipe
from .choice import attention_shape

log = logging.getLogger(__name__)


def named_topology(name: str, recipe: Recipe, world_size: int, device: str = "") -> tuple[Topology, Speed]:
    """Return a preset topology between the ranks that share a sequence, and the speed of attention on a device.

    `device` is a GPU as torch names it; the speed is assumed unless a record has it.

    With tensor parallelism these are every `parallel.tensor`-th rank of the world, so fewer of them are in one node or
    behind one port.
    """
    speed, _ = speed_of(device, recipe.train.attention_backend)
    return PRESETS[name](world_size).every(recipe.parallel.tensor), speed


def measured_topology(recipe: Recipe, mesh: Mesh) -> tuple[Topology, Speed]:
    """Return the measured links between the ranks that share a sequence, and their attention speed. Collective."""
    shape = attention_shape(recipe)
    found = probe(
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        getattr(torch, recipe.train.dtype),
        mesh.device,
        group=mesh.data_group,
        backend=recipe.train.attention_backend,
        options=mesh.communicator_options,
    )
    log.info("topology: %s", found.to_json())
    return found.topology, found.speed
