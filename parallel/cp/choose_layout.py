"""Choice of a layout for a packing: the passes of all layouts are simulated, and the fastest is taken.

Only tiles and messages that the documents of a packing need are simulated, from the rows that shares need of each
other, which are counted for all layouts at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, get_args

import numpy as np

from .cost import AttentionShape, Speed
from .grid import CpGrid, Layout
from .needs import roads_of
from .packed import Runs, divided
from .plan import PASSES
from .simulate import Floats, Tiles, Traffic, simulate, wires_of
from .topology import Topology
from .visible import Meetings, Pieces, Visibility

CLEARLY = 0.98
"""Another layout is taken where it takes less than this part of zigzag's time: rows are counted without the gaps that
messages carry."""


class LayersOf(NamedTuple):
    """Layers whose attention is divided by one grid."""

    grid: CpGrid
    window: int | None
    """Attention window in tokens; None for full attention."""
    num_layers: int


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
        found = [divided(layout, self.num_tokens, document_starts, self.size, windows) for layout in layouts]
        seconds = self.seconds(found, document_starts)
        fastest = int(np.argmin(seconds))
        return found[fastest if seconds[fastest] < CLEARLY * seconds[0] else 0]  # 0: zigzag

    def seconds(self, layouts: Sequence[Sequence[Runs]], document_starts: tuple[int, ...]) -> Floats:
        """Return the time of the attention of all layers, both passes, but for trades of heads: `[layouts]`.

        `layouts` has the runs of each rank under each layout.
        """
        # Shares of all layouts in one array: rank r of layout n has number n x size + r, and documents do not meet.
        pieces = Pieces.of_runs([runs for shares in layouts for runs in shares], document_starts)
        pieces = replace(pieces, document=pieces.document + pieces.owner // self.size * len(document_starts))
        [met] = Meetings.of(pieces)  # all in one part; every layer is causal
        total = np.zeros(len(layouts))
        for of in self._priced:
            total += of.num_layers * self._seconds_of_layer(of, met, len(layouts))
        return total

    @property
    def _priced(self) -> list[LayersOf]:
        """Layers whose work depends on the layout: without several positions, ranks differ in heads only."""
        return [of for of in self.layers if of.grid.num_positions > 1]

    def _seconds_of_layer(self, of: LayersOf, met: Meetings, num_layouts: int) -> Floats:
        """Return the time of both passes of one layer, `[layouts]`."""
        grid, roads, traffic = of.grid, roads_of(of.grid), _traffic(of.grid, self.topology)
        num_links = len(wires_of(self.topology, grid.size).names)
        num_pairs, num_rows = roads.needed(met, Visibility(window=of.window), num_layouts)
        found = np.zeros(num_layouts)
        for direction, rows in zip(PASSES, num_rows, strict=True):
            row_bytes = self.shape.batch * self.shape.row_bytes(grid, direction)[roads.flow_of]  # [flow legs]
            num_bytes = (rows * row_bytes[:, None]).reshape(num_layouts, -1)  # [layouts, messages]
            for layout in range(num_layouts):
                [at] = num_pairs[layout].nonzero()  # tiles that see anything
                seconds = self.speed.seconds(num_pairs[layout, at], self.shape, grid, direction)
                tiles = Tiles(roads.tiles.half[at], roads.tiles.rank[at], seconds)
                sent = traffic._replace(num_bytes=num_bytes[layout])  # 0 bytes: not sent
                found[layout] += simulate(sent, tiles, grid.size, num_links).ready.max()
        return found


@lru_cache(maxsize=64)
def _traffic(grid: CpGrid, topology: Topology) -> Traffic:
    """Return the messages of a grid with their links, without bytes."""
    _, source, target, posted, due = roads_of(grid).messages
    return wires_of(topology, grid.size).traffic(source, target, posted, due, np.zeros(0))
