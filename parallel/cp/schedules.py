"""From a grid to the plans of its ranks: which tile when, and from that which message when."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

from ...kernels.layout import SeqLayout
from .grid import CpGrid, Order, Route
from .layout import joined
from .plan import Block, Flow, Message, Pass, RankPlan, Side, Step, Tile
from .visible import Rows, Sight, hull, visible_rows


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
    onward: tuple[int, ...]
    """Where the owner stands at the places that the block goes on to."""


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
            found.append(Leg(owner, owner, max(0, number - turn), before, ()))
        else:
            onward = tuple(owners[number - 1 + turn :: turn])
            found.append(Leg(owner, 1 if owner > 0 else -1, max(0, number - turn), before, onward))
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
        self.layouts = [  # by place
            joined(layouts[place * grid.heads :][: grid.heads]) for place in range(grid.places)
        ]
        self.legs: dict[Side, tuple[Leg, ...]] = {
            "queries": legs(grid.query_route, grid.query, grid.in_flight),
            "keys": legs(grid.kv_route, grid.kv, grid.in_flight),
        }
        self.tiles = tile_order(grid.query, grid.kv, grid.order)
        self.first = int(grid.heads > 1)  # the step of the first tile: heads are traded before
        self.end = self.first + len(self.tiles) + int(grid.places > 1)  # the step by which all results are at home
        self.first_use: dict[Side, dict[int, int]] = {"queries": {}, "keys": {}}
        self.last_use: dict[Side, dict[int, int]] = {"queries": {}, "keys": {}}
        for step, numbers in enumerate(self.tiles, self.first):
            for side, number in zip(("queries", "keys"), numbers, strict=True):
                self.first_use[side].setdefault(number, step)
                self.last_use[side][number] = step
        self._visible = cache(lambda query, key: visible_rows(self.layouts[query], self.layouts[key], sight))

    def plan(self, rank: int) -> RankPlan:
        """What `rank` does."""
        heads = self.grid.heads
        place, shard = divmod(rank, heads)
        sends: list[Message] = []
        receives: list[Message] = []
        for side in ("queries", "keys"):
            line = self._line(side, place)
            receives += self._messages(side, line)
            for at in range(1, len(line)):
                sends += self._messages(side, line[at:] + line[:at], source=place)
        results = {
            Block("queries" if m.flow == "query_results" else "keys", m.owner): m.rows
            for m in sends
            if m.flow.endswith("results")
        }
        if heads > 1:
            # Ranks of a place that hold the same shard of heads talk to each other.
            sends, receives = (
                [m._replace(source=m.source * heads + shard, target=m.target * heads + shard) for m in found]
                for found in (sends, receives)
            )
            for other in range(place * heads, (place + 1) * heads):
                if other != rank:
                    sends += self._trade(rank, other)
                    receives += self._trade(other, rank)
        return RankPlan(rank, place, self._steps(place, sends, receives), results)

    def plans(self) -> list[RankPlan]:
        """What every rank does."""
        return [self.plan(rank) for rank in range(self.grid.size)]

    def _line(self, side: Side, place: int) -> list[int]:
        """The places along an axis, in order, from this one round to the one before it."""
        j, i = divmod(place, self.grid.query)
        if side == "queries":
            return [j * self.grid.query + (i + ahead) % self.grid.query for ahead in range(self.grid.query)]
        return [(j + ahead) % self.grid.kv * self.grid.query + i for ahead in range(self.grid.kv)]

    def _messages(self, side: Side, line: list[int], source: int | None = None) -> list[Message]:
        """What travels along an axis to line[0], from all or one; the other places of `line` follow it round."""
        messages = self._blocks(side, line, source)
        if side == "queries" or self.direction == "backward":
            messages += self._results(side, line, source)
        return messages

    def _blocks(self, side: Side, line: list[int], source: int | None) -> list[Message]:
        messages = []
        first_use = self.first_use[side]
        for number, leg in enumerate(self.legs[side], 1):
            owner, sender = line[leg.owner], line[leg.source]
            if source in (None, sender):
                # With what this place needs of it, and those that it passes it on to.
                stops = [line[0], *(line[leg.owner - ahead] for ahead in leg.onward)]
                rows = self._needed(side, owner, stops)
                if rows is not None:
                    messages.append(
                        Message(side, owner, rows, sender, line[0], first_use[leg.after], first_use[number])
                    )
        return messages

    def _results(self, side: Side, line: list[int], source: int | None) -> list[Message]:
        flow: Flow = "query_results" if side == "queries" else "key_results"
        route = self.grid.query_route if side == "queries" else self.grid.kv_route
        last_use, size = self.last_use[side], len(line)
        messages = []
        for number, leg in enumerate(self.legs[side], 1):
            due = self.end
            if route == "round":
                # From the next place, which has added its own to what came to it; after all stops to the owner.
                sender, owner = line[1], line[(number + 1) % size]
                stops = [line[(number + 1 - stop) % size] for stop in range(1, number + 1)]
                if number + 1 < size:
                    due = last_use[number + 1] + 1
            else:
                sender, owner = line[-leg.owner], line[0]
                stops = [sender]
                if leg.before is not None:
                    due = last_use[leg.before] + 1
            if source in (None, sender):
                rows = self._needed(side, owner, stops)
                if rows is not None:
                    messages.append(Message(flow, owner, rows, sender, line[0], last_use[number] + 1, due))
        return messages

    def _needed(self, side: Side, owner: int, stops: list[int]) -> Rows | None:
        """Rows of the owner's block that take part in the tiles of any of these places."""
        found: list[Rows] = []
        for stop in stops:
            # Against all that the stop gathers along the other axis.
            for other in self._line("keys" if side == "queries" else "queries", stop):
                rows = self._visible(owner, other) if side == "queries" else self._visible(other, owner)
                if rows is not None:
                    found.append(rows[0 if side == "queries" else 1])
        return hull(found) if found else None

    def _trade(self, source: int, target: int) -> list[Message]:
        """Between ranks of a place: the source's tokens for the target's heads, and at the end back."""
        there = Message("to_heads", source, (0, self.rank_layouts[source].num_tokens), source, target, 0, 1)
        back = Message(
            "from_heads", target, (0, self.rank_layouts[target].num_tokens), source, target, self.end, self.end + 1
        )
        return [there, back]

    def _tile(self, place: int, step: int) -> Tile | None:
        """What a place computes at a step."""
        if not 0 <= step - self.first < len(self.tiles):
            return None
        row, column = self.tiles[step - self.first]
        query = self._line("queries", place)[self.legs["queries"][row - 1].owner if row else 0]
        key = self._line("keys", place)[self.legs["keys"][column - 1].owner if column else 0]
        rows = self._visible(query, key)
        return Tile(query, rows[0], key, rows[1]) if rows else None

    def _steps(self, place: int, sends: list[Message], receives: list[Message]) -> tuple[Step, ...]:
        num_steps = max([self.end, *(m.due + 1 for m in (*sends, *receives))])
        due, gone, out, into = ([[] for _ in range(num_steps)] for _ in range(4))
        tiles = [self._tile(place, step) for step in range(num_steps)]
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
