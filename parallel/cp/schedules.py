"""Schedules: the order of a grid's tiles, the messages that this order requires, and the plans of all ranks.

Both ends of a message derive it from the same arithmetic, so no rank ever asks another for its plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ...kernels.layout import SeqLayout
from .grid import CpGrid
from .layout import position_layouts
from .legs import Leg, legs, tile_order
from .plan import FLOWS, Flow, Message, Messages, Pass, RankPlan, Share, Side, Step, Tile
from .rows import Rows, within
from .visible import Ints, Pieces, Tokens, TravellingRows, Visibility, hull, pairs_between, rows_needed

ROWS_AT_ONCE = 2**14
"""Number of pieces and lines for which rows are computed at once: numpy's calls cost more than a few rows do, but 1,024
ranks have two million."""


class Schedule:
    """Pass of a grid over the layouts of its ranks; `plan(rank)` is the part of one rank.

    Raises ValueError if there is not one layout for each rank.
    """

    def __init__(self, grid: CpGrid, layouts: Sequence[SeqLayout], visibility: Visibility, direction: Pass) -> None:
        if len(layouts) != grid.size:
            raise ValueError(
                f"schedule: {grid} is for {grid.size} ranks, and there are {len(layouts)} layouts; give one for each "
                "rank"
            )
        self.grid: CpGrid = grid
        self.direction: Pass = direction
        self.rank_layouts = layouts
        self.layouts = position_layouts(layouts, grid.heads)
        """Layout of each grid position: the tokens of its ranks together, in order."""
        self.legs: dict[Side, tuple[Leg, ...]] = {
            "queries": legs(grid.query_route, grid.query, grid.in_flight),
            "keys": legs(grid.kv_route, grid.kv, grid.in_flight),
        }
        self.tile_numbers = tile_order(grid.query, grid.kv, grid.order)
        self.first = int(grid.heads > 1)
        """Step of the first tile: 1 if heads are traded first, else 0."""
        self.end = self.first + len(self.tile_numbers) + int(grid.num_positions > 1)
        """Step at which all results have reached their owners."""
        self.first_use: dict[Side, dict[int, int]] = {"queries": {}, "keys": {}}
        self.last_use: dict[Side, dict[int, int]] = {"queries": {}, "keys": {}}
        for step, numbers in enumerate(self.tile_numbers, self.first):
            for side, number in zip(("queries", "keys"), numbers, strict=True):
                self.first_use[side].setdefault(number, step)
                self.last_use[side][number] = step
        # [side, tile]: offsets of the owners of a tile's queries and of its keys, in the order of the tiles.
        owners = [np.array([0, *(leg.owner for leg in self.legs[side])]) for side in ("queries", "keys")]
        self._tile_owners = np.array([of[n] for of, n in zip(owners, np.array(self.tile_numbers).T, strict=True)])
        self.visibility = visibility
        self._all_pieces = Pieces.of(self.layouts)
        self._pieces = self._all_pieces.of_shared_documents()
        position = np.arange(grid.num_positions)
        self._lines: dict[Side, Ints] = {"queries": position // grid.query, "keys": position % grid.query}
        """Line of each position along the axis on which queries, or keys, travel."""
        self._needed_rows: dict[tuple[Side, bytes], Ints] = {}

    def turned(self, direction: Pass) -> Schedule:
        """Return the schedule of a pass of the same attention; it shares what does not depend on the direction."""
        other = copy(self)
        other.direction = direction
        vars(other).pop("_all", None)  # of this direction
        return other

    @cached_property
    def pairs(self) -> Ints:
        """Number of visible pairs of each tile, `[owner of queries, owner of keys]`."""
        return pairs_between(self._all_pieces, self.grid.num_positions, self.visibility)

    def plan(self, rank: int) -> RankPlan:
        """Return the plan of `rank`."""
        position = rank // self.grid.heads
        # Shares that travel along an axis through a position are owned by positions of the same line of the grid.
        owners: dict[Side, Ints] = {side: self._line(side, np.array(position)) for side in self.legs}
        found, travelling = self._messages(owners, np.array([position]))
        sends = _one_by_one(found.select(found.source == rank), travelling)
        receives = _one_by_one(found.select(found.target == rank), travelling)
        results = {
            Share("queries" if m.flow == "query_results" else "keys", m.owner): m.rows
            for m in sends
            if m.flow.endswith("results")
        }
        return RankPlan(rank, position, self._steps(position, sends, receives), results)

    def plans(self) -> list[RankPlan]:
        """Return the plans of all ranks."""
        return [self.plan(rank) for rank in range(self.grid.size)]

    @property
    def all_messages(self) -> Messages:
        """Messages of all ranks in the whole pass."""
        return self._all[0]

    def one_by_one(self, messages: Messages) -> list[Message]:
        """Return `messages`, a selection of `all_messages`, as `Message` objects."""
        return _one_by_one(messages, self._all[1])

    @cached_property
    def _all(self) -> tuple[Messages, dict[Side, _Travelling]]:
        positions = np.arange(self.grid.num_positions)
        return self._messages({"queries": positions, "keys": positions}, positions)

    def _messages(self, owners: dict[Side, Ints], traders: Ints) -> tuple[Messages, dict[Side, _Travelling]]:
        """Return the messages for shares of `owners`, and the trades of heads at the positions `traders`.

        `owners` has arrays `[owners]` of grid positions, by the axis on which their shares travel. With the messages
        come the rows of these shares that travel.
        """
        parts: list[Messages] = []
        travelling: dict[Side, _Travelling] = {}
        for side in self.legs:
            if self.legs[side]:
                found, travelling[side] = self._along(side, owners[side])
                parts += found
        heads = self.grid.heads
        if heads == 1:
            return Messages.joined(parts), travelling
        # A message between positions is one message for each part of the heads, between ranks of the same index.
        of_ranks = [
            part._replace(source=part.source * heads + index, target=part.target * heads + index)
            for part in parts
            for index in range(heads)
        ]
        return Messages.joined([*of_ranks, *self._trades(traders)]), travelling

    def tiles(self, step: Any, position: Any) -> tuple[Ints, Ints]:
        """Return the owners of the queries and of the keys that each position multiplies at each step.

        Steps count from 0 and must have a tile (`first` is the first); the arguments broadcast.
        """
        rows, columns = self._tile_owners[:, np.asarray(step) - self.first]
        return self._ahead("queries", position, rows), self._ahead("keys", position, columns)

    def _ahead(self, side: Side, position: Any, by: Any) -> Ints:
        """Return the positions at offset `by` along an axis, cyclically; the arguments broadcast."""
        j, i = np.divmod(position, self.grid.query)
        if side == "queries":
            return j * self.grid.query + (i + by) % self.grid.query
        return (j + by) % self.grid.kv * self.grid.query + i

    def _line(self, side: Side, position: Ints) -> Ints:
        """Return all positions along the axis through each position, starting with it: `[...]` -> `[..., axis]`."""
        return self._ahead(side, position[..., None], np.arange(self.grid.query if side == "queries" else self.grid.kv))

    def _along(self, side: Side, owners: Ints) -> tuple[list[Messages], _Travelling]:
        """Return the messages along an axis: shares of `owners` first, leg by leg, then the results for them."""
        legs, of_shares, of_results = self.legs[side], *self.journeys(side, owners)
        has_results = side == "queries" or self.direction == "backward"
        # needed: rows with which the stop of each leg computes. onward: the same with the rows that later stops need
        # and that pass through this stop. Both are [legs, pieces, 2], and their hulls over the pieces [legs, owners,
        # 2].
        owner = self._pieces.of_owners(owners).owner
        needed = self._needed(side, owners)
        onward = _passed_on(legs, needed)
        spans, result_spans = (hull(rows, owner, len(owners)) for rows in (onward, needed))
        if has_results and self.is_summed(side):
            # Sums for rows of earlier stops pass through this stop, in the order of their rows. So every leg carries
            # one range of each piece: the hull of the rows that any stop needs.
            onward = np.broadcast_to(np.stack([needed[..., 0].min(0), needed[..., 1].max(0)], -1), needed.shape)
            for before, of_leg in pairwise(result_spans):
                _extend(of_leg, before)
        rows, number = TravellingRows(onward, owner, len(owners)), _column(range(len(legs)))
        travelling = _Travelling(dict(zip(owners.tolist(), range(len(owners)), strict=True)), rows)
        shares = Messages.of(side, owners, spans, rows.count(spans), number, *of_shares)
        if not has_results:
            return [shares], travelling
        flow: Flow = "query_results" if side == "queries" else "key_results"
        results = Messages.of(flow, owners, result_spans, rows.count(result_spans), number, *of_results)
        return [shares, results], travelling

    def is_summed(self, side: Side) -> bool:
        """Return whether results for shares of a side are summed on their way."""
        return (self.grid.query_route if side == "queries" else self.grid.kv_route) == "round"

    def journeys(self, side: Side, owners: Ints) -> tuple[Journeys, Journeys]:
        """Return source, target and steps of the shares of `owners` along an axis, and of the results for them."""
        legs, (first_use, last_use) = self.legs[side], (self.first_use[side], self.last_use[side])
        stops = self._ahead(side, owners, -_column(leg.owner for leg in legs))  # [legs, owners]
        sources = self._ahead(side, stops, _column(leg.source for leg in legs))
        posted = _column(first_use[leg.after] for leg in legs)
        due = _column(first_use[number] for number in range(1, len(legs) + 1))
        shares = Journeys(sources, stops, posted, due)
        if self.is_summed(side):
            # To the next position, with the sum so far; from the last stop to the owner.
            targets = self._ahead(side, owners, -_column(range(2, len(legs) + 2)))
            due = _column([*(last_use[number] + 1 for number in range(2, len(legs) + 1)), self.end])
        else:
            targets = owners
            due = _column(self.end if leg.before is None else last_use[leg.before] + 1 for leg in legs)
        posted = _column(last_use[number] + 1 for number in range(1, len(legs) + 1))
        return shares, Journeys(stops, targets, posted, due)

    def _needed(self, side: Side, owners: Ints) -> Ints:
        """Return the rows of the pieces of `owners` that the tiles of each stop use: `[legs, pieces, 2]`."""
        key = side, owners.tobytes()
        if key not in self._needed_rows:
            # A stop computes with all shares that it gathers along the other axis: those of one line.
            other: Side = "keys" if side == "queries" else "queries"
            pieces, tokens = self._pieces.of_owners(owners), Tokens(self._pieces, self._lines[other])
            lines = np.arange(self.grid.query if side == "queries" else self.grid.kv)
            at_once = max(1, ROWS_AT_ONCE // max(1, len(pieces.start)))
            of_lines = np.concatenate([  # [lines, pieces, 2]
                rows_needed(pieces, side, tokens, lines[n : n + at_once], self.visibility)
                for n in range(0, len(lines), at_once)
            ])  # fmt: skip
            # Positions to which each leg brings a piece, [legs, pieces].
            stops = self._ahead(side, owners[pieces.owner], -_column(leg.owner for leg in self.legs[side]))
            self._needed_rows[key] = of_lines[self._lines[other][stops], np.arange(len(pieces.start))]
        return self._needed_rows[key]

    def _trades(self, positions: Ints) -> list[Messages]:
        """Return the messages that trade tokens for heads before the first tile, and back after the last."""
        heads = self.grid.heads
        pairs = np.array([pair for pair in np.ndindex(heads, heads) if pair[0] != pair[1]])
        # [positions, pairs, (source, target)] -> two arrays of ranks [positions x pairs]
        source, target = (positions[:, None, None] * heads + pairs).reshape(-1, 2).T
        held = np.array([[0, layout.num_tokens] for layout in self.rank_layouts])
        return [
            Messages.of("to_heads", source, held[source], held[source, 1], 0, source, target, 0, 1),
            Messages.of("from_heads", target, held[target], held[target, 1], 0, source, target, self.end, self.end + 1),
        ]

    def _steps(self, position: int, sends: list[Message], receives: list[Message]) -> tuple[Step, ...]:
        """Return the steps of one rank with these messages, in the order in which the rank posts and waits."""
        num_steps = max([self.end, *(m.due + 1 for m in (*sends, *receives))])
        due, waited, out, into = ([[] for _ in range(num_steps)] for _ in range(4))  # messages by step
        tiles: list[Tile | None] = [None] * num_steps
        held = {m.share: m.rows for m in receives if m.flow in ("queries", "keys")}
        for step, tile in enumerate(self._tiles(position, held), self.first):
            tiles[step] = tile
        # A foreign share is freed after its last use: its arrival, the last tile, or the last time it is passed on.
        last_use: dict[Share, int] = {}
        for message in receives:
            due[message.due].append(message)
            into[message.posted].append(message)
            if message.flow in ("queries", "keys"):
                last_use[Share(message.flow, message.owner)] = message.due
        for message in sends:
            out[message.posted].append(message)
            waited[message.due].append(message)
            if message.flow in ("queries", "keys") and message.owner != position:
                share = Share(message.flow, message.owner)
                last_use[share] = max(last_use[share], message.posted)
        for step, tile in enumerate(tiles):
            for share in (Share("queries", tile.query_owner), Share("keys", tile.key_owner)) if tile else ():
                if share in last_use:
                    last_use[share] = max(last_use[share], step)
        done = [[] for _ in range(num_steps)]
        for share, step in last_use.items():
            done[step].append(share)
        return tuple(
            Step(tuple(due[at]), tuple(waited[at]), tuple(out[at]), tuple(into[at]), tile, tuple(done[at]))
            for at, tile in enumerate(tiles)
        )

    def _tiles(self, position: int, held: dict[Share, Rows]) -> Iterator[Tile | None]:
        """Yield the tiles of a position in order; None: nothing is visible. `held` has the rows of foreign shares."""
        owners: dict[Side, Ints] = {side: self._line(side, np.array(position)) for side in self.legs}
        # By side the rows that are visible in a tile, [owners of the other side, owners of this side, 2].
        spans = {"queries": self._spans("queries", *owners.values()), "keys": self._spans("keys", *owners.values())}
        of_queries, of_keys = ([Share(side, owner) for owner in of.tolist()] for side, of in owners.items())
        # Offsets along the axes, of which both_ways has negative ones, as indices of `_line`.
        for query, key in (self._tile_owners % [[self.grid.query], [self.grid.kv]]).T.tolist():
            if not query and not key:  # the own tile: every token sees itself
                whole = ((0, self.layouts[position].num_tokens),)
                yield Tile(position, whole, position, whole)
                continue
            of_query, of_key = spans["queries"][key, query].tolist(), spans["keys"][query, key].tolist()
            if of_query[0] >= of_query[1]:
                yield None
                continue
            # Rows of the own share are one view; of a foreign share only the rows that were sent are here.
            query_rows = within(held[of_queries[query]], *of_query) if query else (tuple(of_query),)
            key_rows = within(held[of_keys[key]], *of_key) if key else (tuple(of_key),)
            yield Tile(of_queries[query].owner, query_rows, of_keys[key].owner, key_rows)

    def _spans(self, side: Side, queries: Ints, keys: Ints) -> Ints:
        """Return, for each tile of two owners, the hull of the visible rows of its share of one side.

        `queries` and `keys` are the owners of either side; the result is `[owners of the other side, owners of this
        side, 2]` as (start, stop).
        """
        mine, others = (queries, keys) if side == "queries" else (keys, queries)
        pieces, of_others = self._pieces.of_owners(mine), self._pieces.of_owners(others)
        lines = np.arange(len(others))
        rows = rows_needed(pieces, side, Tokens(of_others, lines), lines, self.visibility)
        return hull(rows, pieces.owner, len(mine))


class Journeys(NamedTuple):
    """Ends and steps of all messages that may travel along an axis; arrays that broadcast to `[legs, owners]`."""

    source: Ints
    """Grid position."""
    target: Ints
    """Grid position."""
    posted: Ints
    due: Ints


class _Travelling(NamedTuple):
    """Rows of some owners' shares that travel, with the numbering of these owners."""

    number: dict[int, int]
    """Index into `rows` of each owner's share, by grid position."""
    rows: TravellingRows


def _one_by_one(messages: Messages, travelling: dict[Side, _Travelling]) -> list[Message]:
    """Return each message as a `Message`."""
    found = []
    # tolist: Python integers, so that rows can index tensors and messages print plainly.
    for flow, owner, start, stop, _, leg, *rest in zip(*(column.tolist() for column in messages), strict=True):
        name, rows = FLOWS[flow], ((start, stop),)
        if name not in ("to_heads", "from_heads"):
            of = travelling["queries" if name in ("queries", "query_results") else "keys"]
            rows = of.rows.runs(leg, of.number[owner], start, stop)
        found.append(Message(name, owner, rows, *rest))
    return found


def _column(numbers: Iterable[int]) -> Ints:
    """Return one number for each leg, `[legs, 1]`."""
    return np.array(list(numbers), np.int64)[:, None]


def _passed_on(legs: Sequence[Leg], rows: Ints) -> Ints:
    """Return, for each leg, the hull of the rows that its stop and the stops to which it passes the share on need.

    `rows` and the result are `[legs, pieces, 2]`.
    """
    found = rows.copy()
    for leg, of_leg in reversed(list(zip(legs, found, strict=True))):
        if leg.onward is not None:
            _extend(of_leg, found[leg.onward - 1])
    return found


def _extend(rows: Ints, by: Ints) -> None:
    """Make ranges `[..., 2]` the hulls of themselves and of `by`, in place."""
    np.minimum(rows[..., 0], by[..., 0], out=rows[..., 0])
    np.maximum(rows[..., 1], by[..., 1], out=rows[..., 1])
