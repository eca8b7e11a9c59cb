"""Which grid of ranks each bucket's attention is divided by: named by the recipe, or the cheapest on the topology."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table

from ..parallel.cp.choose import Priced, Question, choose
from ..parallel.cp.cost import ASSUMED, Speed, Work
from ..parallel.cp.grid import CpGrid
from ..parallel.cp.probe import probe
from ..parallel.cp.topology import PRESETS, Fabric, Topology
from ..parallel.cp.visible import Sight
from ..parallel.mesh import Mesh
from .config import Recipe
from .run_directory import RunDirectory

log = logging.getLogger(__name__)


class Kind(NamedTuple):
    """Layers whose attention costs the same: one bucket's, with a window or without."""

    sequence_tokens: int
    window: int | None


class Pick(NamedTuple):
    """A grid for a kind of layers, and what it was preferred to."""

    kind: Kind
    named: bool
    """By the recipe; else the cheapest."""
    priced: list[Priced]
    """The grid taken, then the runners-up."""

    @property
    def grid(self) -> CpGrid:
        """The grid taken."""
        return self.priced[0].grid


def kinds(recipe: Recipe, lengths: Sequence[int]) -> list[Kind]:
    """The kinds of layers in the buckets, of these lengths, that are spread over ranks."""
    windows = sorted(
        {recipe.model.attention_window(layer) for layer in range(recipe.model.num_layers)}, key=lambda w: w or 0
    )
    spread = [length for length in lengths if recipe.parallel.context_parallel(length) > 1]
    return [Kind(length, window) for length in spread for window in windows]


def work(recipe: Recipe) -> Work:
    """Attention of one layer on one rank of a tensor-parallel group."""
    tensor = recipe.parallel.tensor
    return Work(
        num_heads=recipe.model.num_heads // tensor,
        num_kv_heads=recipe.model.num_kv_heads // tensor,
        head_dim=recipe.model.head_dim,
        itemsize=4 if recipe.train.dtype == "float32" else 2,
        narrow_results=recipe.parallel.cp.narrow_results,
    )


def check(recipe: Recipe) -> None:
    """Raise ValueError when a grid that the recipe names does not fit its ranks or heads."""
    shape = work(recipe)
    size = 2
    while size <= recipe.max_context_parallel:
        grid = recipe.parallel.cp.named_grid(size)
        unfit = grid and grid.unfit(shape.num_heads, shape.num_kv_heads)
        if unfit:
            raise ValueError(
                f"parallel.cp: {grid} for the buckets over {size} ranks: {unfit} (model.num_heads and num_kv_heads "
                f"over parallel.tensor = {recipe.parallel.tensor})"
            )
        size *= 2


def pick(recipe: Recipe, lengths: Sequence[int], topology: Topology, speed: Speed) -> list[Pick]:
    """A grid for every kind of layers: the one that the recipe names for its number of ranks, or the cheapest."""
    picks = []
    for kind in kinds(recipe, lengths):
        size = recipe.parallel.context_parallel(kind.sequence_tokens)
        question = Question(kind.sequence_tokens, work(recipe), topology, speed, Sight(window=kind.window))
        named = recipe.parallel.cp.named_grid(size)
        priced = choose(size, question) if named is None else [question.price(named)]
        picks.append(Pick(kind, named is not None, priced))
    return picks


def named_grids(recipe: Recipe, lengths: Sequence[int]) -> dict[Kind, CpGrid | None]:
    """The grid that the recipe names for every kind of layers; None: it leaves that to the cost model."""
    return {
        kind: recipe.parallel.cp.named_grid(recipe.parallel.context_parallel(kind.sequence_tokens))
        for kind in kinds(recipe, lengths)
    }


def agree(recipe: Recipe, mesh: Mesh, lengths: Sequence[int], console: Console | None) -> dict[Kind, CpGrid]:
    """The grid of every kind of layers, the same on all ranks. Collective.

    Where the recipe leaves one to the cost model, rank 0 prices the family on the topology, measured or named, and
    tells the others. The run's directory keeps what was taken: a run that goes on, divided alike, goes on alike.
    """
    wanted = named_grids(recipe, lengths)
    left = [kind for kind, grid in wanted.items() if grid is None]
    taken: list[dict[Kind, CpGrid]] = [{}]
    file, division = RunDirectory(recipe.run_directory).schedules_file, _division(recipe, mesh)
    if left and mesh.rank == 0:
        taken = [_kept(file, division)]
    dist.broadcast_object_list(taken)
    if any(kind not in taken[0] for kind in left):
        name = _topology(recipe)
        topology, speed = _measured(recipe, mesh) if name == "probe" else preset(name, recipe, mesh.world_size)
        if mesh.rank == 0:
            picks = pick(recipe, lengths, topology, speed)
            taken = [{found.kind: found.grid for found in picks} | taken[0]]
            for found in picks:
                prices = "; ".join(
                    f"{x.grid}: {x.seconds * 1e3:.3g} ms, {x.exposed_s * 1e3:.3g} exposed" for x in found.priced
                )
                log.info("attention of %s over %d ranks: %s", found.kind, found.grid.size, prices)
            if console is not None:
                console.print(picks_table(picks, topology))
            _keep(file, division, taken[0])
        dist.broadcast_object_list(taken)
    return {kind: grid or taken[0][kind] for kind, grid in wanted.items()}


def preset(name: str, recipe: Recipe, world_size: int) -> tuple[Topology, Speed]:
    """A named topology, as the ranks that share a sequence see it, and a GPU's assumed speed."""
    topology, tensor = PRESETS[name](world_size), recipe.parallel.tensor
    # The ranks that share a sequence are every `tensor`-th: so many fewer of them are in a node, or behind a port.
    return replace(
        topology,
        ranks_per_node=max(1, topology.ranks_per_node // tensor),
        inside=_every(tensor, topology.inside),
        across=topology.across and _every(tensor, topology.across),
    ), ASSUMED


def _every(tensor: int, fabric: Fabric) -> Fabric:
    """A fabric whose ends are every `tensor`-th; those between use it as much, so that a port they share is divided."""
    ends = max(1, fabric.ends_per_port // tensor)
    return replace(fabric, ends_per_port=ends, bytes_per_s=fabric.bytes_per_s * ends / fabric.ends_per_port)


def _measured(recipe: Recipe, mesh: Mesh) -> tuple[Topology, Speed]:
    shape = work(recipe)
    found = probe(
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        getattr(torch, recipe.train.dtype),
        mesh.device,
        group=mesh.data_group,
        backend=recipe.train.attention_backend,
    )
    log.info("topology: %s", found.to_json())
    return found.topology, found.speed


def _topology(recipe: Recipe) -> str:
    """What the recipe says, but no measurement in a run that shall be bit-equal to another."""
    name = recipe.parallel.cp.topology
    return "full_mesh" if name == "probe" and recipe.train.deterministic else name


def _division(recipe: Recipe, mesh: Mesh) -> str:
    """All that a run may change between two starts and that decides which grid is the best."""
    parallel = recipe.parallel
    return (
        f"{mesh.world_size} ranks, tensor {parallel.tensor}, {parallel.tokens_per_rank} tokens a rank, "
        f"{_topology(recipe)}, results {'narrow' if parallel.cp.narrow_results else 'in fp32'}"
    )


def _kept(file: Path, division: str) -> dict[Kind, CpGrid]:
    """What an earlier start of the run, divided alike, has taken."""
    return {
        Kind(entry["sequence_tokens"], entry["window"]): CpGrid.parse(entry["grid"])
        for entry in _all_kept(file).get(division, [])
    }


def _all_kept(file: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; remove it, and the grids are chosen anew") from error


def _keep(file: Path, division: str, grids: dict[Kind, CpGrid]) -> None:
    kept = _all_kept(file)
    kept[division] = [{**kind._asdict(), "grid": str(grid)} for kind, grid in grids.items()]
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(kept, indent=2) + "\n")
    partial.rename(file)


def picks_table(picks: Sequence[Pick], topology: Topology) -> Table:
    """A row for each kind of layers."""
    table = Table(
        title=f"Attention over several ranks, per layer and sequence, as priced on {topology.name}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("bucket", "window", "cp"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("taken")
    for name in ("ms", "exposed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("next best")
    for found in picks:
        best, *others = found.priced
        runners_up = "; ".join(f"{other.grid} {other.seconds * 1e3:.3g} ms" for other in others[:2])
        table.add_row(
            f"{found.kind.sequence_tokens:,}",
            f"{found.kind.window:,}" if found.kind.window else "",
            str(best.grid.size),
            str(best.grid),
            f"{best.seconds * 1e3:.3g}",
            f"{best.exposed_s * 1e3:.3g}",
            "named by the recipe" if found.named else runners_up,
        )
    return table
