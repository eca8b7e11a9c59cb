"""The grid of every layer kind: the one that the recipe names, or the cheapest on a topology."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...parallel.cp.choose import PricedGrid, Pricer, choose
from ...parallel.cp.cost import AttentionShape, Speed
from ...parallel.cp.grid import CpGrid
from ...parallel.cp.packed import typical_packing
from ...parallel.cp.topology import Topology
from ...parallel.cp.visible import Visibility
from ..config import Recipe
from .division import lays_out_packings


class LayerKind(NamedTuple):
    """Layers whose attention costs the same: one bucket, one attention window."""

    sequence_tokens: int
    """Sequence length of the bucket."""
    window: int | None
    """Attention window in tokens; None for full attention."""


class GridChoice(NamedTuple):
    """The grid chosen for one layer kind, and the grids it was preferred to."""

    kind: LayerKind
    """Layer kind that the grid is for."""
    named: bool
    """Whether the recipe names the grid; otherwise it is the cheapest."""
    taken: PricedGrid
    """Chosen grid with its price."""
    others: list[PricedGrid]
    """The other grids that were priced, cheapest first."""

    @property
    def grid(self) -> CpGrid:
        """The chosen grid, without its price."""
        return self.taken.grid


def layer_kinds(recipe: Recipe, lengths: Sequence[int]) -> list[LayerKind]:
    """Return the layer kinds of the buckets of these lengths; buckets that fit one rank have none."""
    # Layers of one bucket differ in their window only; full attention (None) comes first.
    windows = sorted(
        {recipe.model.attention_window(layer) for layer in range(recipe.model.num_layers)}, key=lambda w: w or 0
    )
    spread = [length for length in lengths if recipe.parallel.context_parallel(length) > 1]
    return [LayerKind(length, window) for length in spread for window in windows]


def attention_shape(recipe: Recipe) -> AttentionShape:
    """Return the sizes of one layer's attention on one rank of a tensor-parallel group."""
    tensor = recipe.parallel.tensor
    return AttentionShape(
        num_heads=recipe.model.num_heads // tensor,
        num_kv_heads=recipe.model.num_kv_heads // tensor,
        head_dim=recipe.model.head_dim,
        itemsize=4 if recipe.train.dtype == "float32" else 2,  # bytes
        narrow_results=recipe.parallel.cp.narrow_results,
    )


def pricer(recipe: Recipe, kind: LayerKind, topology: Topology, speed: Speed) -> Pricer:
    """Return the cost model of the grids of one layer kind.

    Grids are priced over one document, or, if the recipe lays packings out, over a packing of documents whose mean
    length is the number of tokens of a rank.
    """
    visibility = Visibility(window=kind.window)
    packed = lays_out_packings(recipe)
    starts = typical_packing(kind.sequence_tokens, recipe.parallel.tokens_per_rank) if packed else (0,)  # in tokens
    return Pricer(kind.sequence_tokens, attention_shape(recipe), topology, speed, visibility, document_starts=starts)


def check_named_grids(recipe: Recipe) -> None:
    """Raise ValueError if a grid that the recipe names does not fit its ranks or heads."""
    # Only degrees up to that of the largest bucket occur; grids named for larger ones are never used.
    shape = attention_shape(recipe)
    size = 2  # context-parallel degrees are powers of two
    while size <= recipe.max_context_parallel:
        grid = recipe.parallel.cp.named_grid(size)
        unfit = grid and grid.unfit(shape.num_heads, shape.num_kv_heads)
        if unfit:
            raise ValueError(
                f"parallel.cp: grid {grid} for buckets over {size} ranks: {unfit} (model.num_heads and num_kv_heads "
                f"over parallel.tensor = {recipe.parallel.tensor}); set parallel.cp.schedule = auto, or another grid"
            )
        size *= 2


def named_grids(recipe: Recipe, lengths: Sequence[int]) -> dict[LayerKind, CpGrid | None]:
    """Return the grid that the recipe names for every layer kind; None leaves the choice to the cost model.

    Raises ValueError if a named grid has another number of ranks.
    """
    return {
        kind: recipe.parallel.cp.named_grid(recipe.parallel.context_parallel(kind.sequence_tokens))
        for kind in layer_kinds(recipe, lengths)
    }


def choose_grids(recipe: Recipe, lengths: Sequence[int], topology: Topology, speed: Speed) -> list[GridChoice]:
    """Return the choice for every layer kind, in the order of `layer_kinds`: the named grid, or else the cheapest.

    Raises ValueError if a named grid has another number of ranks, or if the topology has too few.
    """
    choices = []
    for kind, named in named_grids(recipe, lengths).items():
        asked = pricer(recipe, kind, topology, speed)
        if named is not None:
            choices.append(GridChoice(kind, True, asked.price(named), []))
        else:
            cheapest, *others = choose(recipe.parallel.context_parallel(kind.sequence_tokens), asked)  # best first
            choices.append(GridChoice(kind, False, cheapest, others))
    return choices
