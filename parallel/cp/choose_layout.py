"""Choice of a layout for a packing: the passes of layouts are simulated, and the fastest is taken.

Only tiles and messages that the documents of a packing need are simulated, from the rows that shares need of each
other, which are counted for all layouts at once. A layout is not simulated where its busiest rank or its busiest link
alone takes longer than another layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, get_args

import numpy as np

from .cost import AttentionShape, Speed
from .grid import CpGrid, Layout
from .needs import template_of
from .packed import Runs, divided
from .plan import PASSES
from .simulate import Floats, Tiles, Traffic, least_seconds, simulate, wires_of
from .topology import Topology
from .visible import Meetings, Pieces, Visibility

CLEARLY = 0.98
"""Another layout is taken where it takes less than this part of zigzag's time: rows are counted without the gaps that
messages carry."""
ROUNDING = 1e-9
"""More than the relative error of a sum of some thousand tiles or messages in fp64."""


class LayersOf(NamedTuple):
    """Layers whose attention is divided by one grid."""

    grid: CpGrid
    window: int | None
    """Attention window in tokens; None for full attention."""
    num_layers: int


class _Passes(NamedTuple):
    """Both passes of one kind of layers under one layout."""

    num_layers: int
    num_ranks: int
    bytes_per_s: Floats
    """Bandwidth of each link, `[links]`."""
    passes: list[tuple[Traffic, Tiles]]

    @property
    def seconds(self) -> float:
        """Simulated time of all layers."""
        num_links = len(self.bytes_per_s)
        return self.num_layers * sum(simulate(*of, self.num_ranks, num_links).ready.max() for of in self.passes)

    @property
    def least_seconds(self) -> float:
        """A lower bound of `seconds`, found in a fraction of the time that their simulation takes."""
        return self.num_layers * sum(least_seconds(*of, self.bytes_per_s) for of in self.passes)


@dataclass(frozen=True)
class LayoutPricer:
    """Everything but the documents that determines the price of a layout; its choice is the same on all ranks."""

    num_tokens: int
    """Tokens of a sequence."""
    layers: tuple[LayersOf, ...]
    shape: AttentionShape
    topology: Topology
    speed: Speed

    @property
    def size(self) -> int:
        """The number of ranks that share a sequence."""
        return self.layers[0].grid.size

    def choose(self, document_starts: tuple[int, ...]) -> list[Runs]:
        """Return the runs of each rank under the fastest layout of a packing; zigzag unless another is `CLEARLY`."""
        layouts: tuple[Layout, ...] = get_args(Layout)
        if len(document_starts) == 1 or not self._priced:
            return divided("zigzag", self.num_tokens, document_starts, self.size)
        windows = tuple((of.window, of.num_layers) for of in self.layers)
        per_node = self.topology.ranks_per_node
        found = [divided(layout, self.num_tokens, document_starts, self.size, windows, per_node) for layout in layouts]
        passes = self._passes(found, document_starts)
        factors = np.array([CLEARLY if layout == "zigzag" else 1.0 for layout in layouts])
        least = factors * [sum(of.least_seconds for of in of_layout) for of_layout in passes]
        fastest = float("inf"), 0  # seconds and layout; of equal times that of the first layout
        for layout in np.argsort(least).tolist():
            # Layouts come in order of their bounds, so that from here on none is faster. Bounds and times are rounded.
            if least[layout] > (1 + ROUNDING) * fastest[0]:
                break
            seconds = factors[layout] * sum(of.seconds for of in passes[layout])
            fastest = min(fastest, (seconds, layout))
        return found[fastest[1]]

    def seconds(self, layouts: Sequence[Sequence[Runs]], document_starts: tuple[int, ...]) -> Floats:
        """Return the time of the attention of all layers, both passes, but for trades of heads: `[layouts]`.

        `layouts` has the runs of each rank under each layout.
        """
        return np.array([sum(of.seconds for of in passes) for passes in self._passes(layouts, document_starts)])

    def _passes(self, layouts: Sequence[Sequence[Runs]], document_starts: tuple[int, ...]) -> list[list[_Passes]]:
        """Return both passes of each kind of layers under each layout."""
        # Shares of all layouts in one array: rank r of layout n has number n x size + r, and documents do not meet.
        pieces = Pieces.of_runs([runs for shares in layouts for runs in shares], document_starts)
        pieces = replace(pieces, document=pieces.document + pieces.owner // self.size * len(document_starts))
        [met] = Meetings.of(pieces)  # all in one part; every layer is causal
        found: list[list[_Passes]] = [[] for _ in layouts]
        for of in self._priced:
            for of_layout, passes in zip(found, self._passes_of_layer(of, met, len(layouts)), strict=True):
                of_layout.append(passes)
        return found

    @property
    def _priced(self) -> list[LayersOf]:
        """Layers whose work depends on the layout: without several positions, ranks differ in heads only."""
        return [of for of in self.layers if of.grid.num_positions > 1]

    def _passes_of_layer(self, of: LayersOf, met: Meetings, num_layouts: int) -> Iterator[_Passes]:
        """Yield both passes of one layer under each layout."""
        grid, template, wires = of.grid, template_of(of.grid), wires_of(self.topology, of.grid.size)
        traffic = _traffic(grid, self.topology)
        num_pairs, rows = template.needed(met, Visibility(window=of.window), num_layouts)
        for layout in range(num_layouts):
            [at] = num_pairs[layout].nonzero()  # tiles that see anything
            half, rank, pairs = template.tiles.half[at], template.tiles.rank[at], num_pairs[layout, at]
            passes: list[tuple[Traffic, Tiles]] = []
            for direction in PASSES:
                row_bytes = self.shape.batch * self.shape.row_bytes(grid, direction)
                num_bytes = template.num_bytes(rows, layout, direction, row_bytes)  # 0 bytes: not sent
                seconds = self.speed.seconds(pairs, self.shape, grid, direction)
                passes.append((traffic._replace(num_bytes=num_bytes), Tiles(half, rank, seconds)))
            yield _Passes(of.num_layers, grid.size, wires.link_bytes_per_s, passes)


@lru_cache(maxsize=64)
def _traffic(grid: CpGrid, topology: Topology) -> Traffic:
    """Return the messages of a grid with their links, without bytes."""
    _, source, target, posted, due = template_of(grid).messages
    return wires_of(topology, grid.size).traffic(source, target, posted, due, np.zeros(0))
