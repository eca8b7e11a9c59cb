"""`longring train`: check a run, then start its ranks on this node."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import Recipe
from ..preflight import preflight
from ..ranks.node import check_node
from ..ranks.nodes import ManyNodes
from ..ranks.start import local_ranks, start_ranks


def start_training(
    recipe: Recipe,
    settings: Sequence[str],
    *,
    ranks: int | None,
    stop_after: int | None,
    nodes: ManyNodes,
    check_this_node: bool,
) -> int:
    """Start the ranks of this node; return an exit status.

    `settings` are the arguments from which every rank reads the same recipe: its file and the overrides.
    `nodes` joins the launchers of several nodes. Raises ValueError, before any rank starts, if
    recipe, data, run directory or node do not fit.
    """
    count = ranks or local_ranks(recipe.train.ranks_per_node)
    if check_this_node:
        check_node(recipe, count)
    preflight(recipe, count * nodes.nodes, check_shards=nodes.node == 0)  # one node checks the shards for all
    meeting = nodes.rendezvous()
    stop = ["--stop-after", str(stop_after)] if stop_after else []
    queues = recipe.parallel.gpu_queues
    return start_ranks("longring.launch.train", [*settings, *stop], count, meeting, gpu_queues=queues)
