"""Needs of a packing: the tiles that have visible pairs and the messages that have rows, under several layouts at once.

A plan has the same tiles and messages, with the rows of each. Here rows are only counted, and tiles and messages that
no document needs cost nothing, so that layouts can be simulated for each micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np

from ...kernels.layout import SeqLayout
from .grid import CpGrid
from .legs import Leg
from .plan import FLOWS, PASSES, Flow, Pass, Side
from .schedules import Schedule
from .simulate import Floats
from .visible import FAR, Ints, Meetings, Visibility

RESULTS: dict[Side, Flow] = {"queries": "query_results", "keys": "key_results"}
"""The flow of the results for the shares of each side."""


class GridTiles(NamedTuple):
    """Tiles of all ranks of a grid as columns, each `[tiles]`, in the order of their halves."""

    half: Ints
    """Half of a step, as in `simulate.Tiles`."""
    rank: Ints


class GridMessages(NamedTuple):
    """Messages that the ranks of a grid may send, as columns, each `[messages]`, in the order of their posts."""

    flow: Ints
    """Index into `FLOWS`."""
    source: Ints
    """Rank."""
    target: Ints
    """Rank."""
    posted: Ints
    """Half of a step, as in `simulate.Traffic`."""
    due: Ints


class FlowRows(NamedTuple):
    """Rows of all messages of one flow, under several layouts."""

    flow: int
    """Index into `FLOWS`."""
    flow_legs: Ints
    """Numbers of its flow legs, `[legs]`."""
    of_passes: tuple[Floats, Floats]
    """Rows in the forward and in the backward, `[layouts, legs, positions]`; a flow that a pass lacks has some too."""


class _GridTemplate:
    """All tiles and messages that a grid can have: the part of the needs that does not depend on documents."""

    def __init__(self, grid: CpGrid) -> None:
        self.grid, size, position = grid, grid.num_positions, np.arange(grid.num_positions)
        # One token a rank: which tiles and messages there are, and when, does not depend on the tokens.
        layouts = [SeqLayout(((at, at + 1),)) for at in range(grid.size)]
        self.schedule = Schedule(grid, layouts, Visibility(), "backward")
        steps = self.schedule.first + np.arange(len(self.schedule.tile_numbers))[:, None]  # [steps, 1]
        owners = self.schedule.tiles(steps, position)  # [steps, positions]
        self.tile, computes = np.zeros((2, size, size), np.int64)  # computes: position that computes the tile
        """Number of the tile of each pair of owners, `[owner of queries, owner of keys]`."""
        # Each pair of owners meets in exactly one tile of the grid, so every entry is written once.
        self.tile[owners], computes[owners] = np.arange(size**2).reshape(-1, size), position
        half = np.broadcast_to(2 * steps + 1, owners[0].shape).repeat(grid.heads)
        self.tiles = GridTiles(half, np.tile(np.arange(grid.size), len(steps)))
        self.leg: dict[Side, Ints] = {}
        """Leg by which the share of each owner reaches the position of each tile, `[owner of queries, owner of keys]`;
        -1: it is not sent there."""
        self.flow_legs: dict[Side, Ints] = {}
        """Numbers of the flow legs of each side, in the order of posts, `[(shares, results), legs]`. A flow leg is all
        messages of one flow on one leg, one from each position."""
        columns_of: list[Ints] = []  # of each side and flow, [columns, legs, positions]
        for side, legs in self.schedule.legs.items():
            if not legs:
                continue
            shares, results = self.schedule.journeys(side, position)
            of_stop = np.full((size, size), -1)  # [owner, stop]
            of_stop[position, shares.target] = np.arange(len(legs))[:, None]
            self.leg[side] = of_stop[position[:, None] if side == "queries" else position, computes]
            before = sum(of.size for of in self.flow_legs.values())
            self.flow_legs[side] = np.arange(before, before + 2 * len(legs)).reshape(2, -1)
            for flow, (source, target, posted, due) in ((side, shares), (RESULTS[side], results)):
                later = int(flow == side)  # shares are exchanged in the second half of a step
                columns = FLOWS.index(flow), source, target, 2 * posted + later, 2 * due + later
                columns_of.append(np.stack([np.broadcast_to(of, (len(legs), size)) for of in columns]))
        # [columns, flow legs, positions]; all messages of a flow leg are posted in one half.
        columns = np.concatenate(columns_of, axis=1)
        order = columns[GridMessages._fields.index("posted"), :, 0].argsort(kind="stable")
        # order.argsort(): number before the sort -> number after it.
        self.flow_legs = {side: order.argsort()[of] for side, of in self.flow_legs.items()}
        # [flow legs, heads, positions]: a message between positions is one between ranks of each index.
        head = np.arange(grid.heads)[:, None]
        flow, source, target, posted, due = (of[:, None] + 0 * head for of in columns[:, order])
        ends = source * grid.heads + head, target * grid.heads + head
        self.messages = GridMessages(*(of.ravel() for of in (flow, *ends, posted, due)))

    def needed(self, met: Meetings, visibility: Visibility, num_layouts: int) -> tuple[Floats, list[FlowRows]]:
        """Return the visible pairs of tiles, `[layouts, tiles]` in the order of `tiles`, and the rows of messages.

        `met` says how the pieces of documents meet; owners of these pieces are ranks, those of layout n from n x ranks
        on.
        """
        heads, size = self.grid.heads, self.grid.num_positions
        num_pairs = met.num_pairs(visibility)
        seen = num_pairs > 0
        pieces = replace(met.pieces, owner=met.pieces.owner // heads)  # positions, of layout n from n x size on
        met, num_pairs = Meetings(pieces, met.query[seen], met.key[seen]), num_pairs[seen]
        layout, query = np.divmod(pieces.owner[met.query], size)
        key = pieces.owner[met.key] % size
        of_tiles = np.bincount(layout * size**2 + self.tile[query, key], num_pairs, num_layouts * size**2)

        row = np.empty_like(pieces.start)  # first row of each piece, numbered consecutively over all shares
        in_order, num_rows = (pieces.owner * FAR + pieces.start).argsort(), pieces.stop - pieces.start
        row[in_order] = np.cumsum(num_rows[in_order]) - num_rows[in_order]
        found: list[FlowRows] = []
        for side, of_tile in self.leg.items():
            leg = of_tile[query, key]
            sent = leg >= 0
            reached = met._replace(query=met.query[sent], key=met.key[sent])
            shape = num_layouts, len(self.schedule.legs[side]), size
            *shares, results = self._rows(side, _needed(reached, leg[sent], row, side, visibility, shape))
            for flow, numbers, rows in zip(
                (side, RESULTS[side]), self.flow_legs[side], (shares, (results, results)), strict=True
            ):
                found.append(FlowRows(FLOWS.index(flow), numbers, (rows[0], rows[1])))
        of_ranks = np.broadcast_to(of_tiles.astype(float, copy=False)[:, None], (len(of_tiles), heads))
        return of_ranks.reshape(num_layouts, -1), found

    def num_bytes(self, rows: Sequence[FlowRows], layout: int, direction: Pass, row_bytes: Ints) -> Floats:
        """Return the bytes of each of `messages`, `[messages]`, under one layout.

        `row_bytes` are those of a row of each flow, `[flows]`.
        """
        num_legs, size = sum(len(of.flow_legs) for of in rows), self.grid.num_positions
        found = np.zeros((num_legs, self.grid.heads, size))
        for of in rows:
            if row_bytes[of.flow]:
                of_leg = of.of_passes[PASSES.index(direction)][layout] * row_bytes[of.flow]
                found[of.flow_legs] = of_leg[:, None]  # [legs, 1, positions], for all heads
        return found.reshape(-1)

    def _rows(self, side: Side, needed: _Needed) -> tuple[Floats, Floats, Floats]:
        """Return the rows of the shares of a side in the forward, in the backward, and of the results for them."""
        legs = self.schedule.legs[side]
        if self.schedule.is_summed(side):
            shares, results = needed.summed()
            # In the forward keys have no results: each leg then carries only what its own stop and later ones need.
            return needed.passed_on(legs) if side == "keys" else shares, shares, results
        results = needed.at_stops()
        shares = needed.passed_on(legs) if any(leg.onward for leg in legs) else results
        return shares, shares, results


template_of = lru_cache(maxsize=64)(_GridTemplate)
"""The template of a grid; made once, then kept."""


class _Needed(NamedTuple):
    """Rows of pieces that the stops of legs need, as columns `[n]`, in the order of pieces and legs.

    Rows are numbered consecutively over all shares. Pieces ascend within a share, and the rows of one piece that a stop
    needs are one range.
    """

    shape: tuple[int, int, int]
    """Number of layouts, of legs and of positions."""
    cell: Ints
    """Index of layout, leg and owner in an array of this shape."""
    piece: Ints
    leg: Ints
    first: Ints
    stop: Ints

    def at_stops(self) -> Floats:
        """Return the rows that the stop of each leg needs, `shape`."""
        return self._sums(self.cell, self.stop - self.first)

    def passed_on(self, legs: Sequence[Leg]) -> Floats:
        """Return the rows that each leg carries for its stop and all to which it is passed on, `shape`."""
        # Pairs of a leg and the leg on which its stop passes the share on, both from 0, the last pair first.
        onward = [(number, leg.onward - 1) for number, leg in enumerate(legs) if leg.onward is not None][::-1]
        chain = np.arange(len(legs))  # number of the last leg of each journey
        for leg, then in onward:
            chain[leg] = chain[then]
        # From the last stop of a journey back, the range of a piece grows. Later journeys lie beyond earlier ones.
        key = self.piece * len(legs) + chain[self.leg]
        order = ((key + 1) * len(legs) - self.leg).argsort()  # one combined key: lexsort would sort several times
        journey = np.cumsum(np.diff(key[order], prepend=-1) > 0) * FAR
        num_rows = np.maximum.accumulate(self.stop[order] + journey) - journey
        num_rows -= np.minimum.accumulate(self.first[order] - journey) + journey
        goes_on = np.flatnonzero(np.diff(journey) == 0)  # the next entry is an earlier stop
        cell = self.cell[order]
        # Each entry counts the rows that its stop adds to those of the stop after it. The sum along the journey then
        # gives the rows of a leg, also where a stop in between needs nothing of a piece.
        found = self._sums(np.append(cell, cell[goes_on + 1]), np.append(num_rows, -num_rows[goes_on]))
        for leg, then in onward:
            found[:, leg] += found[:, then]
        return found

    def summed(self) -> tuple[Floats, Floats]:
        """Return the rows of shares, and of results, where results are summed on their way: both `shape`.

        A message carries the rows that any stop needs, from the first to the last row that its own stops need.
        """
        from .hulls import lengths_of_hulls  # imported late, as in `simulate`

        # The rows of a piece that any of its stops needs are one range.
        begins = np.flatnonzero(np.diff(self.piece, prepend=-1))  # first entry of each piece
        ranges = (self.first, self.stop)
        if len(begins):
            ranges = np.minimum.reduceat(self.first, begins), np.maximum.reduceat(self.stop, begins)
        order = ranges[0].argsort()
        # sums[n]: needed rows of all ranges before the n-th; `starts` ends with a row that no range has.
        starts, sums = np.append(ranges[0][order], FAR), np.append(0, np.cumsum((ranges[1] - ranges[0])[order]))

        def below(row: Ints) -> Ints:
            """Return the number of rows before `row` that any stop needs."""
            at = np.searchsorted(starts, row)  # ranges that begin before the row
            before = np.maximum(at - 1, 0)
            return np.minimum(sums[before] + row - starts[before], sums[at])

        # Hulls of the rows that each stop needs, counted in needed rows: rows in between that no stop needs do not
        # count.
        first, stop = np.full(self.shape, FAR), np.zeros(self.shape, np.int64)
        np.minimum.at(first.reshape(-1), self.cell, below(self.first))
        np.maximum.at(stop.reshape(-1), self.cell, below(self.stop))

        num_legs = self.shape[1]
        # Sums of results grow from the first stop on; shares carry what their stop and all later ones need.
        in_order = np.arange(num_legs)
        return lengths_of_hulls(first, stop, in_order[::-1]), lengths_of_hulls(first, stop, in_order)

    def _sums(self, cell: Ints, num_rows: Ints) -> Floats:
        """Return the rows of all cells, `shape`."""
        return np.bincount(cell, num_rows, prod(self.shape)).astype(float, copy=False).reshape(self.shape)


def _needed(
    met: Meetings, leg: Ints, row: Ints, side: Side, visibility: Visibility, shape: tuple[int, int, int]
) -> _Needed:
    """Return the rows that stops need; `leg` is that of each pair of pieces, `row` the first row of each piece."""
    of, (mine, others) = met.pieces, (met.query, met.key) if side == "queries" else (met.key, met.query)
    # Groups: a piece and a leg, whose stop has tokens of the other side from `first` to before `last`.
    most = int(leg.max(initial=0)) + 1
    group = mine * most + leg
    order = group.argsort()
    begins = np.flatnonzero(np.diff(group[order], prepend=-1))
    piece, leg = np.divmod(group[order[begins]], most)
    first, last = of.start[others[order]], of.stop[others[order]]
    if len(begins):
        first, last = np.minimum.reduceat(first, begins), np.maximum.reduceat(last, begins)
    reach = FAR if visibility.window is None else visibility.window - 1
    # A query sees keys from `reach` before it to itself, as in `visible.rows_needed`.
    low, high = (first, last + reach) if side == "queries" else (first - reach, last)
    start, stop = of.start[piece], of.stop[piece]
    to_row = row[piece] - start  # position -> row
    layout, owner = np.divmod(of.owner[piece], shape[2])
    cell = (layout * shape[1] + leg) * shape[2] + owner
    return _Needed(shape, cell, piece, leg, np.maximum(low, start) + to_row, np.minimum(high, stop) + to_row)
