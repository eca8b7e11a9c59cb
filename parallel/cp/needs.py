"""Needs of a packing: the tiles that have visible pairs and the messages that have rows, under several layouts at once.

A plan says the same with the rows of each message; here rows are only counted, and what no document needs costs
nothing, so that layouts can be simulated for each micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ...kernels.layout import SeqLayout
from .grid import CpGrid
from .plan import FLOWS, Flow, Side
from .schedules import Journeys, Schedule
from .visible import FAR, Ints, Meetings, Visibility

RESULTS: dict[Side, Flow] = {"queries": "query_results", "keys": "key_results"}
"""The flow of the results for the shares of each side."""


class NeededTiles(NamedTuple):
    """Tiles of all ranks as columns, each `[n]`."""

    layout: Ints
    """Number of the layout."""
    half: Ints
    """Half of a step, as in `simulate.Tiles`."""
    rank: Ints
    num_pairs: Ints


class NeededMessages(NamedTuple):
    """Messages of all ranks as columns, each `[n]` but for `rows`."""

    layout: Ints
    """Number of the layout."""
    flow: Ints
    """Index into `FLOWS`."""
    rows: Ints
    """Rows in each pass, `[passes, n]`; 0 where the pass has no such message."""
    source: Ints
    """Rank."""
    target: Ints
    """Rank."""
    posted: Ints
    """Half of a step, as in `simulate.Traffic`."""
    due: Ints


class _Roads:
    """Steps of a grid's tiles and messages, whatever the documents."""

    def __init__(self, grid: CpGrid) -> None:
        self.grid, position = grid, np.arange(grid.num_positions)
        layouts = [SeqLayout(((at, at + 1),)) for at in range(grid.size)]
        self.schedule = Schedule(grid, layouts, Visibility(), "backward")
        # [owner of queries, owner of keys]: half and position of a tile.
        self.half, self.position = np.zeros((2, grid.num_positions, grid.num_positions), np.int64)
        steps = self.schedule.first + np.arange(len(self.schedule.tile_numbers))[:, None]
        owners = self.schedule.tiles(steps, position)
        self.half[owners], self.position[owners] = 2 * steps + 1, position
        self.journeys: dict[Side, tuple[Journeys, Journeys]] = {}
        self.leg: dict[Side, Ints] = {}
        """Leg by which the share of each owner reaches the position of each tile, `[owner of queries, owner of keys]`;
        -1: it is not sent there."""
        for side, legs in self.schedule.legs.items():
            if legs:
                shares, results = self.schedule.journeys(side, position)
                of_stop = np.full((grid.num_positions, grid.num_positions), -1)  # [owner, stop]
                of_stop[position, shares.target] = np.arange(len(legs))[:, None]
                owner = position[:, None] if side == "queries" else position
                self.leg[side], self.journeys[side] = of_stop[owner, self.position], (shares, results)

    def needed(self, met: Meetings, visibility: Visibility, num_layouts: int) -> tuple[NeededTiles, NeededMessages]:
        """Return the tiles and messages that documents need, whose pieces meet as in `met`.

        Owners of these pieces are ranks, those of layout n from n x ranks on.
        """
        grid, num_positions = self.grid, self.grid.num_positions
        num_pairs = met.num_pairs(visibility)
        seen = num_pairs > 0
        met = met._replace(pieces=replace(met.pieces, owner=met.pieces.owner // grid.heads))
        met, num_pairs = met._replace(query=met.query[seen], key=met.key[seen]), num_pairs[seen]
        query, key = met.pieces.owner[met.query], met.pieces.owner[met.key] % num_positions
        tile = query % num_positions * num_positions + key
        # [layouts x tiles]
        of_tiles = np.bincount(
            query // num_positions * num_positions**2 + tile, num_pairs, num_layouts * num_positions**2
        )
        index = np.flatnonzero(of_tiles)
        layout, found = np.divmod(index, num_positions**2)
        columns = layout, self.half.ravel()[found], self.position.ravel()[found] * grid.heads, of_tiles[index]
        tiles = NeededTiles(*_of_all_heads(columns, grid.heads, NeededTiles._fields.index("rank")))

        row = np.empty_like(met.pieces.start)  # first row of each piece: rows of all shares are numbered on
        in_order, num_rows = np.lexsort((met.pieces.start, met.pieces.owner)), met.pieces.stop - met.pieces.start
        row[in_order] = np.cumsum(num_rows[in_order]) - num_rows[in_order]
        parts: list[NeededMessages] = []
        for side, of_tile in self.leg.items():
            leg = of_tile.ravel()[tile]
            sent = leg >= 0
            needed = _needed(met._replace(query=met.query[sent], key=met.key[sent]), leg[sent], row, side, visibility)
            parts += self._messages(side, needed, num_layouts)
        columns = [np.concatenate(of, axis=-1) for of in zip(*parts, strict=True)]
        ends = map(NeededMessages._fields.index, ("source", "target"))
        return tiles, NeededMessages(*_of_all_heads(columns, grid.heads, *ends))

    def _messages(self, side: Side, needed: _Needed, num_layouts: int) -> Iterator[NeededMessages]:
        """Yield the shares of a side and the results for them, between the first ranks of positions."""
        grid, legs, (shares, results) = self.grid, self.schedule.legs[side], self.journeys[side]
        onward = [None if leg.onward is None else leg.onward - 1 for leg in legs]
        num_owners = num_layouts * grid.num_positions
        # [owners, legs]: rows of shares in both passes, and rows of results.
        forward = backward = needed.passed_on(onward, num_owners)
        count = needed.at_stops(len(legs), num_owners)
        if self.schedule.is_summed(side):
            backward, count = needed.summed(len(legs), num_owners)
            forward = forward if side == "keys" else backward
        no_results = np.zeros_like(count) if side == "keys" else count
        for flow, of_passes, journeys in (
            (side, (forward, backward), shares),
            (RESULTS[side], (no_results, count), results),
        ):
            owner, leg = np.nonzero(of_passes[1])
            layout, position = np.divmod(owner, grid.num_positions)
            found = np.stack([of_pass[owner, leg] for of_pass in of_passes])
            at = (np.broadcast_to(x, (len(legs), grid.num_positions))[leg, position] for x in journeys)
            source, target, posted, due = at
            is_share = int(flow == side)
            ends = source * grid.heads, target * grid.heads, 2 * posted + is_share, 2 * due + is_share
            yield NeededMessages(layout, np.full(len(leg), FLOWS.index(flow)), found, *ends)


roads_of = lru_cache(maxsize=64)(_Roads)


class _Needed(NamedTuple):
    """Rows that stops need of pieces of shares, as columns `[n]`, in the order of pieces and legs.

    Rows of all shares are numbered on. Pieces ascend within a share, and what stops need of one is a range.
    """

    owner: Ints
    piece: Ints
    leg: Ints
    first: Ints
    stop: Ints

    def at_stops(self, num_legs: int, num_owners: int) -> Ints:
        """Return the rows that the stop of each leg needs, `[owners, legs]`."""
        found = np.bincount(self.owner * num_legs + self.leg, self.stop - self.first, num_owners * num_legs)
        return found.reshape(num_owners, num_legs).astype(np.int64)

    def passed_on(self, onward: Sequence[int | None], num_owners: int) -> Ints:
        """Return the rows that each leg carries for its stop and all to which it is passed on, `[owners, legs]`.

        `onward` is the leg on which each goes on.
        """
        chain = np.arange(len(onward))  # number of the last leg of each journey
        for leg, then in reversed(list(enumerate(onward))):
            chain[leg] = leg if then is None else chain[then]
        # From the last stop of a journey back, the range of a piece grows. Later journeys lie beyond earlier ones.
        order = np.lexsort((-self.leg, chain[self.leg], self.piece))
        key = (self.piece * len(onward) + chain[self.leg])[order]
        journey = np.cumsum(np.diff(key, prepend=-1) > 0) * FAR
        num_rows = np.maximum.accumulate(self.stop[order] + journey) - journey
        num_rows -= np.minimum.accumulate(self.first[order] - journey) + journey
        index = (self.owner * len(onward) + self.leg)[order]
        goes_on = np.flatnonzero(np.diff(journey) == 0)  # the next one is an earlier stop of the same journey
        size = num_owners * len(onward)
        found = np.bincount(index, num_rows, size) - np.bincount(index[goes_on + 1], num_rows[goes_on], size)
        found = found.reshape(num_owners, len(onward)).astype(np.int64)
        for leg, then in reversed(list(enumerate(onward))):
            if then is not None:
                found[:, leg] += found[:, then]
        return found

    def summed(self, num_legs: int, num_owners: int) -> tuple[Ints, Ints]:
        """Return the rows of shares, and of results, where results are summed on their way: both `[owners, legs]`.

        A message has what any stop needs, between the ends of what its own stops need.
        """
        index = self.owner * num_legs + self.leg
        first, stop = np.full((2, num_owners * num_legs), [[FAR], [0]])
        np.minimum.at(first, index, self.first)
        np.maximum.at(stop, index, self.stop)
        first, stop = (of.reshape(num_owners, num_legs) for of in (first, stop))
        # What stops need of a piece is one range.
        begins = np.flatnonzero(np.diff(self.piece, prepend=-1))
        ranges = (self.first, self.stop)
        if len(begins):
            ranges = np.minimum.reduceat(self.first, begins), np.maximum.reduceat(self.stop, begins)
        order = ranges[0].argsort()
        starts, sums = np.append(ranges[0][order], FAR), np.append(0, np.cumsum((ranges[1] - ranges[0])[order]))

        def below(row: Ints) -> Ints:
            at = np.searchsorted(starts, row)
            before = np.maximum(at - 1, 0)
            return np.minimum(sums[before] + row - starts[before], sums[at])

        def between(first: Ints, stop: Ints) -> Ints:
            return np.where(first < stop, below(stop) - below(first), 0)

        later = first[:, ::-1], stop[:, ::-1]
        shares = between(np.minimum.accumulate(later[0], axis=1), np.maximum.accumulate(later[1], axis=1))[:, ::-1]
        return shares, between(np.minimum.accumulate(first, axis=1), np.maximum.accumulate(stop, axis=1))


def _needed(met: Meetings, leg: Ints, row: Ints, side: Side, visibility: Visibility) -> _Needed:
    """Return the rows that stops need; `leg` is that of each pair of pieces, `row` the first row of each piece."""
    of, (mine, others) = met.pieces, (met.query, met.key) if side == "queries" else (met.key, met.query)
    # Groups: a piece and a leg, whose stop has tokens of the other side from `first` to before `last`.
    most = int(leg.max(initial=0)) + 1
    group = mine * most + leg
    order = group.argsort(kind="stable")
    begins = np.flatnonzero(np.diff(group[order], prepend=-1))
    piece, leg = np.divmod(group[order[begins]], most)
    first, last = of.start[others[order]], of.stop[others[order]]
    if len(begins):
        first, last = np.minimum.reduceat(first, begins), np.maximum.reduceat(last, begins)
    reach = FAR if visibility.window is None else visibility.window - 1
    low, high = (first, last + reach) if side == "queries" else (first - reach, last)
    start, stop = of.start[piece], of.stop[piece]
    to_row = row[piece] - start
    return _Needed(of.owner[piece], piece, leg, np.maximum(low, start) + to_row, np.minimum(high, stop) + to_row)


def _of_all_heads(columns: Sequence[Ints], heads: int, *ranks: int) -> list[Ints]:
    """Return columns with a row for each rank of a position, from those of its first; `ranks` are columns of ranks."""
    index = np.tile(np.arange(heads), columns[0].shape[-1])
    return [of.repeat(heads, axis=-1) + index * (number in ranks) for number, of in enumerate(columns)]
