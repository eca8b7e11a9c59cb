"""Choice of a layout for a packing: the passes of all layouts are simulated side by side, and the fastest is taken.

Layouts and passes are worlds of their own for the simulator: each has its ranks and its links. Only tiles and messages
that the documents of a packing need are simulated, from the rows that shares need of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

import numpy as np

from .cost import AttentionShape, Speed
from .grid import CpGrid, Layout
from .needs import roads_of
from .packed import Runs, divided
from .plan import PASSES
from .simulate import Floats, Tiles, simulate, wires_of
from .topology import Topology
from .visible import Ints, Meetings, Pieces, Visibility

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
        return found[fastest if seconds[fastest] < CLEARLY * seconds[0] else 0]

    def seconds(self, layouts: Sequence[Sequence[Runs]], document_starts: tuple[int, ...]) -> Floats:
        """Return the time of the attention of all layers, both passes, but for trades of heads: `[layouts]`.

        `layouts` has the runs of each rank under each layout.
        """
        # Shares of all layouts in one array: rank r of layout n has number n x size + r, and documents do not meet.
        pieces = Pieces.of_runs([runs for shares in layouts for runs in shares], document_starts)
        pieces = replace(pieces, document=pieces.document + pieces.owner // self.size * len(document_starts))
        [met] = Meetings.of(pieces)
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
        grid, wires = of.grid, wires_of(self.topology, of.grid.size)
        tiles, messages = roads_of(grid).needed(met, Visibility(window=of.window), num_layouts)
        # World p x layouts + n is pass p under layout n: it has ranks and links of its own.
        number, at = _both_passes(tiles.half)
        seconds = np.stack([self.speed.seconds(tiles.num_pairs, self.shape, grid, of) for of in PASSES])
        rank = (number * num_layouts + tiles.layout[at]) * grid.size + tiles.rank[at]
        computed = Tiles(tiles.half[at], rank, seconds[number, at])

        number, at = _both_passes(messages.posted)
        row_bytes = np.stack([self.shape.batch * self.shape.row_bytes(grid, of) for of in PASSES])
        num_bytes = messages.rows[number, at] * row_bytes[number, messages.flow[at]]
        number, at, num_bytes = number[num_bytes > 0], at[num_bytes > 0], num_bytes[num_bytes > 0]
        sent = wires.traffic(messages.source[at], messages.target[at], messages.posted[at], messages.due[at], num_bytes)
        world, num_links, num_worlds = number * num_layouts + messages.layout[at], len(wires.names), 2 * num_layouts
        links = np.where(sent.links == num_links, num_links * num_worlds, sent.links + world * num_links)
        sent = sent._replace(
            source=sent.source + world * grid.size, target=sent.target + world * grid.size, links=links
        )
        times = simulate(sent, computed, num_worlds * grid.size, num_worlds * num_links)
        return times.ready.reshape(2, num_layouts, grid.size).max(-1).sum(0)


def _both_passes(half: Ints) -> tuple[Ints, Ints]:
    """Return the pass and the index of what both passes have, in the order of its halves: two arrays `[2 n]`."""
    order = half.argsort(kind="stable")
    return np.tile(np.arange(len(PASSES)), len(half)), order.repeat(len(PASSES))
