"""Choice of a layout for a packing, by a price between two bounds of the time of a pass.

`cost.play` simulates all ranks step by step, which takes too long for each micro-batch. A pass takes at least as long
as its busiest rank computes and as its busiest link carries; and little more than if all ranks began each step
together: the sum over the steps of the longest tile or the busiest link of that step, whichever takes longer. Where
every share is on its way from the first step on, the lower bound is met; where shares are passed on, ranks wait for
each other, and the time lies between the bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from ...kernels.layout import SeqLayout
from .cost import AttentionShape, Speed, wires_of
from .grid import CpGrid, Layout
from .legs import Leg
from .packed import Runs, divided
from .plan import FLOWS, Messages, Pass, Side
from .schedules import Schedule
from .topology import Topology
from .visible import Ints, Pieces, Visibility, count_up, pairs_between

MARGIN = 0.9
"""Another layout is taken where it is priced below this part of zigzag's price: a price is no simulation."""
IN_STEP = 0.6
"""Weight of the upper bound in the price, where ranks wait for each other; docs/context-parallelism-results.md has how
often the choice is then wrong."""


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
        """Return the runs of each rank under the cheapest layout of a packing; zigzag wins unless by `MARGIN`."""
        layouts: tuple[Layout, ...] = get_args(Layout)
        if len(document_starts) == 1 or not self._priced:
            return divided("zigzag", self.num_tokens, document_starts, self.size)
        found = [divided(layout, self.num_tokens, document_starts, self.size) for layout in layouts]
        seconds = [self.seconds(runs, document_starts) for runs in found]
        cheapest = int(np.argmin(seconds))
        return found[cheapest if seconds[cheapest] < MARGIN * seconds[0] else 0]

    def seconds(self, shares: Sequence[Runs], document_starts: tuple[int, ...]) -> float:
        """Return the price of the attention of all layers, forward and backward, but for trades of heads."""
        pieces = Pieces.of([SeqLayout(runs, document_starts) for runs in shares])
        return sum(of.num_layers * self._seconds_of_layer(of, pieces) for of in self._priced)

    @property
    def _priced(self) -> list[LayersOf]:
        """Layers whose work depends on the layout: without several positions, ranks differ in heads only."""
        return [of for of in self.layers if of.grid.num_positions > 1]

    def _seconds_of_layer(self, of: LayersOf, pieces: Pieces) -> float:
        grid, roads = of.grid, _roads(of.grid, self.topology)
        pieces = replace(pieces, owner=pieces.owner // grid.heads)
        of_tiles = pairs_between(pieces, grid.num_positions, Visibility(window=of.window))
        pairs = of_tiles[roads.tiles]  # [steps, positions]
        shared = pieces.of_shared_documents()
        needed: dict[Side, Ints] = {side: self._needed(of, shared, side) for side, legs in roads.legs.items() if legs}
        total = 0.0
        for direction in get_args(Pass):
            tiles = np.where(pairs > 0, self.speed.seconds(pairs, self.shape, grid, direction), 0.0)
            row_bytes = self.shape.batch * self.shape.row_bytes(grid, direction)
            at_least, by_step = roads.seconds(needed, direction, row_bytes)
            lower = max(float(tiles.sum(0).max()), at_least)
            upper = float(np.maximum(tiles.max(1), by_step).sum())
            weight = IN_STEP if roads.in_step else 0.0
            total += (1 - weight) * lower + weight * max(lower, upper)
        return total

    def _needed(self, of: LayersOf, pieces: Pieces, side: Side) -> Ints:
        """Return the rows of each position's share that each line of the other side needs: `[positions, lines]`.

        Exact for full attention; under an attention window a line counts as if it held all tokens between its ends.
        """
        grid, owner = of.grid, pieces.owner
        num_lines = grid.query if side == "queries" else grid.kv
        line = owner % grid.query if side == "queries" else owner // grid.query
        # Groups: tokens of one document in one line, from `first` to before `last`.
        key = pieces.document * num_lines + line
        order = key.argsort(kind="stable")
        begins = np.flatnonzero(np.diff(key[order], prepend=-1)) if key.size else key
        groups = key[order][begins]
        if not groups.size:
            return np.zeros((grid.num_positions, num_lines), np.int64)
        first, last = np.minimum.reduceat(pieces.start[order], begins), np.maximum.reduceat(pieces.stop[order], begins)
        # Each piece meets all groups of its document.
        at = np.searchsorted(groups, pieces.document * num_lines)
        count = np.searchsorted(groups, (pieces.document + 1) * num_lines) - at
        group, piece = count_up(at, count), np.repeat(np.arange(len(owner)), count)
        reach = 2**40 if of.window is None else of.window - 1
        if side == "queries":
            low, high = first[group], last[group] + reach
        else:
            low, high = first[group] - reach, last[group]
        rows = np.minimum(pieces.stop[piece], high) - np.maximum(pieces.start[piece], low)
        index = owner[piece] * num_lines + groups[group] % num_lines
        rows = np.bincount(index, np.maximum(rows, 0), grid.num_positions * num_lines)
        return rows.reshape(grid.num_positions, num_lines)


class _Roads:
    """Tiles of a grid, all messages that it may send, and the links of a topology that they take."""

    def __init__(self, grid: CpGrid, topology: Topology) -> None:
        layouts = [SeqLayout(((at, at + 1),)) for at in range(grid.size)]
        schedule = Schedule(grid, layouts, Visibility(causal=False), "backward")
        self.legs: dict[Side, tuple[Leg, ...]] = schedule.legs
        routes: dict[Side, str] = {"queries": grid.query_route, "keys": grid.kv_route}
        self._summed = {side: route == "round" for side, route in routes.items()}
        self.in_step = any(
            legs and (routes[side] != "direct" or grid.in_flight < len(legs)) for side, legs in self.legs.items()
        )
        """Whether some shares are sent only after others have been used."""
        wires, position, self._first = wires_of(topology, grid.size), np.arange(grid.num_positions), schedule.first
        num_steps = len(schedule.tile_numbers)
        self.tiles = schedule.tiles(np.arange(self._first, self._first + num_steps)[:, None], position)
        """Owners of the queries and of the keys of each tile, two arrays `[steps, positions]`."""
        # [legs, positions]: line of the other side that the stop of each leg computes with.
        self._line: dict[Side, Ints] = {}
        for side, legs in self.legs.items():
            offsets = np.array([leg.owner for leg in legs], np.int64)[:, None]
            line, size = (position % grid.query, grid.query) if side == "queries" else (position // grid.query, grid.kv)
            self._line[side] = (line - offsets) % size
        self._messages: dict[Pass, Messages] = {}
        self._links: dict[Pass, tuple[NDArray[np.int32], NDArray[np.float64]]] = {}
        self._num_links = len(wires.names)
        for direction in get_args(Pass):
            found = schedule.turned(direction).all_messages
            found = found.select(found.flow < FLOWS.index("to_heads"))
            pair = found.source * grid.size + found.target
            self._messages[direction] = found
            self._links[direction] = wires.links[pair], 1 / wires.bytes_per_s[pair]

    def seconds(self, needed: dict[Side, Ints], direction: Pass, row_bytes: Ints) -> tuple[float, NDArray[np.float64]]:
        """Return the time of the busiest link in a pass, and that of the busiest one by step, `[steps]`.

        `needed` are the rows of each position's share, `[positions, lines]`.
        """
        messages, (links, slowness) = self._messages[direction], self._links[direction]
        rows = np.zeros(len(messages.flow))
        for side, of_lines in needed.items():
            of_legs = np.take_along_axis(of_lines.T, self._line[side], axis=0)  # [legs, positions]
            onward = of_legs.copy()
            for leg, of_leg in reversed(list(zip(self.legs[side], onward, strict=True))):
                if leg.onward is not None:
                    np.maximum(of_leg, onward[leg.onward - 1], out=of_leg)
            results = np.maximum.accumulate(of_legs, axis=0) if self._summed[side] else of_legs
            for flow, found in ((side, onward), ("query_results" if side == "queries" else "key_results", results)):
                mine = messages.flow == FLOWS.index(flow)
                rows[mine] = found[messages.leg[mine], messages.owner[mine]]
        seconds = rows * row_bytes[messages.flow] * slowness
        # [steps, links], the last link being padding; results of the last tile are posted one step later.
        step = np.minimum(messages.posted - self._first, len(self.tiles[0]) - 1)
        index = np.maximum(step, 0)[:, None] * (self._num_links + 1) + links
        num_cells = len(self.tiles[0]) * (self._num_links + 1)
        on_link = np.bincount(index.ravel(), seconds.repeat(links.shape[1]), num_cells)
        on_link = on_link.reshape(len(self.tiles[0]), -1)[:, :-1]
        return float(on_link.sum(0).max(initial=0.0)), on_link.max(1, initial=0.0)


_roads = lru_cache(maxsize=64)(_Roads)
