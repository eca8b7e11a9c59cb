"""From a grid to the plans of its ranks: which tile when, and from that which message when."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from ...kernels.layout import SeqLayout
from .grid import CpGrid, Order, Route
from .layout import joined
from .plan import Block, Flow, Message, Messages, Pass, RankPlan, Side, Step, Tile
from .visible import Ints, Shares, Sight, hull, visible_rows


class Leg(NamedTuple):
    """How the block of row (or column) number 1, 2, ... of a place's tiles comes to it, in places along the axis."""

    owner: int
    """The block is that of the place so far ahead."""
    source: int
    """It comes from the place so far ahead."""
    after: int
    """Number of the leg whose block is taken up when this one is posted; 0: the own block."""
    before: int | None
    """Number of the leg after whose last tile the results for this one must have come home; None: at the end."""
    onward: int | None
    """Number of the leg by which the block goes on from here; None: this is its last stop."""


def legs(route: Route, size: int, in_flight: int) -> tuple[Leg, ...]:
    """The legs of an axis of `size` places, by number from 1."""
    if route == "both_ways":
        owners = [(number + 1) // 2 * (1 if number % 2 else -1) for number in range(1, size)]
        turn = 2
    else:
        owners = list(range(1, size))
        turn = in_flight if route == "direct" else 1
    found = []
    for number, owner in enumerate(owners, 1):
        before = number + turn if number + turn < size else None
        if route == "direct":
            found.append(Leg(owner, owner, max(0, number - turn), before, None))
        else:
            found.append(Leg(owner, 1 if owner > 0 else -1, max(0, number - turn), before, before))
    return tuple(found)


def tile_order(query: int, kv: int, order: Order) -> list[tuple[int, int]]:
    """(row number, column number) of a place's tiles, the own one first."""
    by_rows = order.startswith("rows")
    lines, tiles_of_a_line = (query, kv) if by_rows else (kv, query)
    walk = list(product(range(lines), range(tiles_of_a_line)))
    if not order.endswith("own_first"):
        walk = walk[:1] + walk[tiles_of_a_line:] + walk[1:tiles_of_a_line]
    return walk if by_rows else [(u, t) for t, u in walk]


class Schedule:
    """One pass of a grid over given layouts, one layout a rank; `plan(rank)` is the part of a rank.

    Every rank works out its own part, and never needs another's: both ends of a message come to the same conclusion.
    """

    def __init__(self, grid: CpGrid, layouts: Sequence[SeqLayout], sight: Sight, direction: Pass) -> None:
        if len(layouts) != grid.size:
            raise ValueError(f"schedule: {grid} is for {grid.size} ranks, and there are {len(layouts)} layouts")
        self.grid: CpGrid = grid
        self.direction: Pass = direction
        self.rank_layouts = layouts
        self.layouts = [joined(layouts[place * grid.heads :][: grid.heads]) for place in range(grid.places)]
        """By place."""
        self.legs: dict[Side, tuple[Leg, ...]] = {
            "queries": legs(grid.query_route, grid.query, grid.in_flight),
            "keys": legs(grid.kv_route, grid.kv, grid.in_flight),
        }
        self.tile_numbers = tile_order(grid.query, grid.kv, grid.order)
        self.first = int(grid.heads > 1)
        """Step of the first tile: heads are traded before."""
        self.end = self.first + len(self.tile_numbers) + int(grid.places > 1)
        """Step by which all results are at home."""
        self.first_use: dict[Side, dict[int, int]] = {"queries": {}, "keys": {}}
        self.last_use: dict[Side, dict[int, int]] = {"queries": {}, "keys": {}}
        for step, numbers in enumerate(self.tile_numbers, self.first):
            for side, number in zip(("queries", "keys"), numbers, strict=True):
                self.first_use[side].setdefault(number, step)
                self.last_use[side][number] = step
        # By step from the first: how far ahead the owners of a tile's queries and of its keys are.
        owners = [np.array([0, *(leg.owner for leg in self.legs[side])]) for side in ("queries", "keys")]
        self._tile_owners = np.array([of[n] for of, n in zip(owners, np.array(self.tile_numbers).T, strict=True)])
        self.shares = Shares.of(self.layouts)
        self._sight = sight

    def plan(self, rank: int) -> RankPlan:
        """What `rank` does."""
        place = rank // self.grid.heads
        # What travels along an axis to or from a place belongs to places of that line.
        owners: dict[Side, Ints] = {side: self._line(side, np.array(place)) for side in self.legs}
        found = self._messages(owners, np.array([place]))
        sends = found.where(found.source == rank).one_by_one()
        receives = found.where(found.target == rank).one_by_one()
        results = {
            Block("queries" if m.flow == "query_results" else "keys", m.owner): m.rows
            for m in sends
            if m.flow.endswith("results")
        }
        return RankPlan(rank, place, self._steps(place, sends, receives), results)

    def plans(self) -> list[RankPlan]:
        """What every rank does."""
        return [self.plan(rank) for rank in range(self.grid.size)]

    @cached_property
    def all_messages(self) -> Messages:
        """Of the whole pass."""
        places = np.arange(self.grid.places)
        return self._messages({"queries": places, "keys": places}, places)

    def _messages(self, owners: dict[Side, Ints], traders: Ints) -> Messages:
        """About blocks of these owners, by the axis along which they travel, and among the ranks of these places."""
        parts = [message for side in ("queries", "keys") for message in self._along(side, owners[side])]
        heads = self.grid.heads
        if heads == 1:
            return Messages.joined(parts)
        # Ranks of a place that hold the same shard of heads talk to each other.
        shards = [
            part._replace(source=part.source * heads + shard, target=part.target * heads + shard)
            for part in parts
            for shard in range(heads)
        ]
        return Messages.joined([*shards, *self._trades(traders)])

    def tiles(self, step: Any, place: Any) -> tuple[Ints, Ints]:
        """Whose queries places meet whose keys at steps from `first` on, one with one as arrays are broadcast."""
        rows, columns = self._tile_owners[:, np.asarray(step) - self.first]
        return self._ahead("queries", place, rows), self._ahead("keys", place, columns)

    def _ahead(self, side: Side, place: Any, by: Any) -> Ints:
        """The place so far ahead along an axis."""
        j, i = np.divmod(place, self.grid.query)
        if side == "queries":
            return j * self.grid.query + (i + by) % self.grid.query
        return (j + by) % self.grid.kv * self.grid.query + i

    def _line(self, side: Side, place: Ints) -> Ints:
        """The places along an axis, in order, from each of these round to the one before it: `[..., axis]`."""
        return self._ahead(side, place[..., None], np.arange(self.grid.query if side == "queries" else self.grid.kv))

    def _along(self, side: Side, owners: Ints) -> list[Messages]:
        """What travels along an axis of the blocks of these places, and of results for them."""
        found, legs = [], self.legs[side]
        first_use, last_use = self.first_use[side], self.last_use[side]
        # By number, what each place where a block stops needs of it, and what that and all further stops need.
        needed = {n: self._needed(side, owners, self._ahead(side, owners, -leg.owner)) for n, leg in enumerate(legs, 1)}
        onward = dict(needed)
        for number, leg in reversed(list(enumerate(legs, 1))):
            if leg.onward is not None:
                onward[number] = hull(np.stack([needed[number], onward[leg.onward]]), 0)
        for number, leg in enumerate(legs, 1):
            target = self._ahead(side, owners, -leg.owner)
            source = self._ahead(side, target, leg.source)
            posted, due = first_use[leg.after], first_use[number]
            found.append(Messages.of(side, owners, onward[number], source, target, posted, due))
        if side == "keys" and self.direction == "forward":
            return found
        flow: Flow = "query_results" if side == "queries" else "key_results"
        before = None
        for number, leg in enumerate(legs, 1):
            if (self.grid.query_route if side == "queries" else self.grid.kv_route) == "round":
                # To the next place, with what came and what was added here; after all stops to the owner.
                target, rows = self._ahead(side, owners, -number - 1), needed[number]
                before = rows = rows if before is None else hull(np.stack([before, rows]), 0)
                due = last_use[number + 1] + 1 if number < len(legs) else self.end
            else:
                target, rows = owners, needed[number]
                due = self.end if leg.before is None else last_use[leg.before] + 1
            source = self._ahead(side, owners, -leg.owner)
            found.append(Messages.of(flow, owners, rows, source, target, last_use[number] + 1, due))
        return found

    def _needed(self, side: Side, owners: Ints, stops: Ints) -> Ints:
        """Rows of each owner's block that take part in the tiles of a place, one place for each: `[owners, 2]`."""
        # Against all that the stop gathers along the other axis.
        blocks = self.shares[owners[:, None]]
        if side == "queries":
            return hull(visible_rows(blocks, self.shares[self._line("keys", stops)], self._sight), 1)[:, :2]
        return hull(visible_rows(self.shares[self._line("queries", stops)], blocks, self._sight), 1)[:, 2:]

    def _trades(self, places: Ints) -> list[Messages]:
        """Between ranks of a place: the source's tokens for the target's heads, and at the end back."""
        heads = self.grid.heads
        shards = np.array([pair for pair in np.ndindex(heads, heads) if pair[0] != pair[1]])
        source, target = (places[:, None, None] * heads + shards).reshape(-1, 2).T
        held = np.array([[0, layout.num_tokens] for layout in self.rank_layouts])
        return [
            Messages.of("to_heads", source, held[source], source, target, 0, 1),
            Messages.of("from_heads", target, held[target], source, target, self.end, self.end + 1),
        ]

    def _steps(self, place: int, sends: list[Message], receives: list[Message]) -> tuple[Step, ...]:
        num_steps = max([self.end, *(m.due + 1 for m in (*sends, *receives))])
        due, gone, out, into = ([[] for _ in range(num_steps)] for _ in range(4))
        tiles: list[Tile | None] = [None] * num_steps
        at = np.arange(self.first, self.first + len(self.tile_numbers))
        pairs = self.tiles(at, place)
        rows = visible_rows(self.shares[pairs[0]], self.shares[pairs[1]], self._sight)
        for step, query, key, (*of_query, start, stop) in zip(*(x.tolist() for x in (at, *pairs, rows)), strict=True):
            if start < stop:
                tiles[step] = Tile(query, tuple(of_query), key, (start, stop))
        last_use: dict[Block, int] = {}
        for message in receives:
            due[message.due].append(message)
            into[message.posted].append(message)
            if message.flow in ("queries", "keys"):
                last_use[Block(message.flow, message.owner)] = message.due
        for message in sends:
            out[message.posted].append(message)
            gone[message.due].append(message)
            if message.flow in ("queries", "keys") and message.owner != place:
                block = Block(message.flow, message.owner)
                last_use[block] = max(last_use[block], message.posted)
        for step, tile in enumerate(tiles):
            for block in (Block("queries", tile.query_owner), Block("keys", tile.key_owner)) if tile else ():
                if block in last_use:
                    last_use[block] = max(last_use[block], step)
        done = [[] for _ in range(num_steps)]
        for block, step in last_use.items():
            done[step].append(block)
        return tuple(
            Step(tuple(due[at]), tuple(gone[at]), tuple(out[at]), tuple(into[at]), tile, tuple(done[at]))
            for at, tile in enumerate(tiles)
        )
