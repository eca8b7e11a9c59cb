"""The grids of a run, the same on all ranks: named by the recipe, recalled from an earlier start, or priced."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import zip_longest

import torch
import torch.distributed as dist
from rich.console import Console

from ...parallel.cp.cost import Speed
from ...parallel.cp.grid import CpGrid
from ...parallel.cp.packed import divided
from ...parallel.cp.topology import Topology
from ...parallel.mesh import Mesh
from ..config import Recipe
from ..run_directory import RunDirectory
from ..together import from_rank_0, on_all_ranks, on_rank_0
from .choice import LayerKind, choose_grids, named_grids
from .division import division, topology_name
from .measure import measured_topology, named_topology
from .remembered import recall_grids, recall_links, remember_grids, remember_links
from .table import grids_table

log = logging.getLogger(__name__)


def decide_grids(
    recipe: Recipe, mesh: Mesh, lengths: Sequence[int], console: Console | None = None
) -> dict[LayerKind, CpGrid]:
    """Return the grid of every layer kind of the buckets of these lengths. Collective.

    For a grid that the recipe does not name, rank 0 recalls the grid of an earlier start, or prices all grids on the
    topology and prints a table to `console`. Raises ValueError, on every rank, if ranks would divide sequences
    differently, if the probe fails on any of them, or if grids.json is damaged, and CommonError if it cannot be read or
    written.
    """
    wanted = named_grids(recipe, lengths)
    open_kinds = [kind for kind, grid in wanted.items() if grid is None]
    file, key = RunDirectory(recipe.run_directory).grids_file, division(recipe, mesh.world_size)

    def recalled() -> tuple[dict[LayerKind, CpGrid], bool]:
        """Return the grids of an earlier start, and whether they are all that this one needs."""
        # Not priced again: two probes differ, and another grid sums in another order.
        known = recall_grids(file, key) if open_kinds else {}
        return known, all(kind in known for kind in open_kinds)

    # Only rank 0 decides whether to measure, since a probe takes all ranks and only rank 0 has read the file.
    taken, are_all = on_rank_0(mesh, recalled)
    if not are_all:
        topology, speed = decide_links(recipe, mesh)

        def chosen() -> dict[LayerKind, CpGrid]:
            """Return the grids of an earlier start and, of new layer kinds alone, the cheapest, and remember them."""
            choices = choose_grids(recipe, lengths, topology, speed)
            for choice in choices:
                prices = "; ".join(
                    f"{x.grid}: {x.seconds * 1e3:.3g} ms, {x.exposed_s * 1e3:.3g} exposed"
                    for x in (choice.taken, *choice.others)
                )
                log.info("attention of %s over %d ranks: %s", choice.kind, choice.grid.size, prices)
            if console is not None:
                console.print(grids_table(choices, f"Attention over several ranks, priced on {topology.name}"))
            found = {choice.kind: choice.grid for choice in choices} | taken
            remember_grids(file, key, found)
            return found

        taken = on_rank_0(mesh, chosen)
    grids = {kind: grid or taken.get(kind) for kind, grid in wanted.items()}
    check_agreement(recipe, lengths, grids)
    return {kind: grid for kind, grid in grids.items() if grid is not None}


def decide_links(recipe: Recipe, mesh: Mesh) -> tuple[Topology, Speed]:
    """Return the links and the speed on which grids and layouts are priced: equal on all ranks, in all starts of a run.

    Collective. What a probe measures is kept in the run's directory: another probe would differ, and so would layouts.
    Raises ValueError if the probe fails on any rank, or if grids.json is damaged, and CommonError if the file cannot be
    read or written.
    """
    if (name := topology_name(recipe)) != "probe":
        if mesh.device.type != "cuda":
            return named_topology(name, recipe, mesh.world_size)
        # Rank 0's: the ranks of one run may have GPUs of several names.
        device = torch.cuda.get_device_name(mesh.device)
        return from_rank_0(named_topology(name, recipe, mesh.world_size, device))
    file, key = RunDirectory(recipe.run_directory).grids_file, division(recipe, mesh.world_size)
    if (known := on_rank_0(mesh, lambda: recall_links(file, key))) is not None:
        return known
    measured = on_all_ranks(mesh, partial(measured_topology, recipe, mesh))

    def remembered() -> tuple[Topology, Speed]:
        remember_links(file, key, *measured)
        return measured

    # Rank 0's on all ranks: those of one tensor-parallel group hold the same tokens, but each is in another probe.
    return on_rank_0(mesh, remembered)


def check_agreement(recipe: Recipe, lengths: Sequence[int], grids: Mapping[LayerKind, CpGrid | None]) -> None:
    """Raise ValueError, on every rank of the world, unless all ranks divide sequences alike. Collective.

    Ranks that disagree would wait for messages that no rank sends, or misread messages.
    """
    mine = []
    for length in lengths:
        degree = recipe.parallel.context_parallel(length)
        if degree == 1:
            mine.append(f"{length} tokens on one rank")
            continue
        # The layouts are hashed: as text they would be long, and equal hashes mean equal layouts.
        # Two documents, since every layout of one document is zigzag's.
        cut = [divided(layout, length, (0, length // 3), degree) for layout in recipe.parallel.cp.layouts]
        layouts = f"{recipe.parallel.cp.layout} {hashlib.sha256(repr(cut).encode()).hexdigest()[:16]}"
        taken = {kind.window: str(grid or "auto") for kind, grid in grids.items() if kind.sequence_tokens == length}
        mine.append(
            f"{length} tokens over {degree} ranks, layouts {layouts}, grids by window "
            f"{taken}, {recipe.train.dtype}, narrow_results = {recipe.parallel.cp.narrow_results}"
        )
    gathered: list[list[str]] = [[]] * dist.get_world_size()  # [rank][length]
    dist.all_gather_object(gathered, mine)
    others = [rank for rank, theirs in enumerate(gathered) if theirs != gathered[0]]
    if others:
        pairs = zip_longest(gathered[0], gathered[others[0]], fillvalue="no such length")
        # `next` finds a pair: the two lists differ, or one is longer.
        first, other = next((a, b) for a, b in pairs if a != b)
        raise ValueError(
            f"context parallelism: {len(others)} of {len(gathered)} ranks, the first of them rank {others[0]}, "
            f"disagree with rank 0 about the division of sequences or of attention: {first} on rank 0, {other} on "
            f"rank {others[0]}; start the same code with the same recipe on all nodes"
        )
