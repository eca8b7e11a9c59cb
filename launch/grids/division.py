"""How a start divides attention: starts of a run that divide it alike take the same grids."""

from __future__ import annotations

from ..config import Recipe


def division(recipe: Recipe, world_size: int) -> str:
    """Return a description of all settings that decide the cheapest grid and may change between starts."""
    # The model, the data and the dtype are not here: they stay the same in all starts of a run.
    parallel = recipe.parallel
    packed = ", packed documents" if lays_out_packings(recipe) else ""
    copies = "" if parallel.cp.peer_copies == "auto" else f", copies {parallel.cp.peer_copies}"
    return (
        f"{world_size} ranks, tensor {parallel.tensor}, {parallel.tokens_per_rank} tokens a rank, "
        f"{topology_name(recipe)}, results {'narrow' if parallel.cp.narrow_results else 'in fp32'}{copies}{packed}"
    )


def lays_out_packings(recipe: Recipe) -> bool:
    """Return whether sequences of several documents are divided by their documents, and not in zigzag."""
    return recipe.packs_documents and recipe.parallel.cp.layout != "zigzag"


def topology_name(recipe: Recipe) -> str:
    """Return the name of the topology on which grids are priced, or "probe".

    A deterministic run does not measure: two probes may differ, and with them the grids.
    """
    name = recipe.parallel.cp.topology
    return "full_mesh" if name == "probe" and recipe.train.deterministic else name
