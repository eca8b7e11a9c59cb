"""Plans of all ranks, run on integers: a share is the positions of its rows, a result counts (query, key) pairs.

The tests do not ask the planner what is visible or needed: every pair of positions is checked by itself, a message
carries what its source holds at that moment, and the results are compared with the whole mask at the end.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from helpers.lanes import by_lane
from helpers.layouts import of_packing, scattered
from helpers.plain_attention import visible_pairs
from hypothesis import given
from hypothesis import strategies as st
from longring.kernels.layout import SeqLayout
from longring.parallel.cp import schedules, visible
from longring.parallel.cp.grid import NAMED, CpGrid, grids
from longring.parallel.cp.layout import contiguous, zigzag
from longring.parallel.cp.legs import tile_order
from longring.parallel.cp.plan import Channel, Flow, Message, Pass, RankPlan, Share, Side
from longring.parallel.cp.rows import Rows
from longring.parallel.cp.schedules import Schedule
from longring.parallel.cp.visible import Visibility

Layouts = list[SeqLayout]
PASSES: tuple[Pass, ...] = ("forward", "backward")


def layouts_of(
    num_tokens: int, size: int, starts: tuple[int, ...] = (0,), cut: Callable[..., SeqLayout] = zigzag
) -> Layouts:
    return [SeqLayout(cut(num_tokens, rank, size).runs, starts) for rank in range(size)]


@lru_cache(maxsize=64)
def whole(num_tokens: int, starts: tuple[int, ...], visibility: Visibility) -> np.ndarray:
    """Return the mask of the context, bool `[query position, key position]`."""
    layout = SeqLayout(((0, num_tokens),), starts)
    return visible_pairs(layout, layout, visibility.causal, visibility.window).numpy()


def positions(layout: SeqLayout) -> list[int]:
    return [position for start, stop in layout.runs for position in range(start, stop)]


class Player:
    """One rank. Its results count pairs, int `[rows of a share, positions of the context]`; each must end at 1."""

    def __init__(self, plan: RankPlan, grid: CpGrid, layouts: Layouts, visible: np.ndarray, direction: Pass) -> None:
        self.plan, self.visible = plan, visible
        self.mine = np.array(positions(layouts[plan.rank]))
        self.of_rank = [np.array(positions(layout)) for layout in layouts]
        self.of_position = [
            np.sort(np.concatenate(self.of_rank[position * grid.heads : (position + 1) * grid.heads]))
            for position in range(grid.num_positions)
        ]
        self.tokens = {plan.rank: self.mine}  # tokens of the grid position that are here, by rank
        own = self.of_position[plan.position]
        self.held: dict[Share, tuple[np.ndarray, np.ndarray]] = {}
        """Positions and rows that are here of each share, both ascending."""
        self.held[Share("queries", plan.position)] = self.held[Share("keys", plan.position)] = own, np.arange(len(own))
        self.sides: tuple[Side, ...] = ("queries",) if direction == "forward" else ("queries", "keys")
        self.home = {side: np.zeros((len(own), len(visible)), int) for side in self.sides}
        self.partial: dict[Share, np.ndarray] = {}
        self.sent: set[Share] = set()
        self.used: dict[tuple[Share, str], list[tuple[int, int]]] = defaultdict(list)
        self.peak: dict[Side, int] = {"queries": 0, "keys": 0}
        self.tiles = 0

    def run(self, post: Callable[..., None]) -> Generator[Message, np.ndarray, dict[int, dict[Side, np.ndarray]]]:
        """Yield each message to wait for, receive its content; return the results of its tokens, by source."""
        position, rank, posted = self.plan.position, self.plan.rank, set()
        final: dict[int, dict[Side, np.ndarray]] = {rank: {side: self._rows_of_mine(side) for side in self.sides}}
        arriving: Counter[Side] = Counter()
        for at, step in enumerate(self.plan.steps):
            for message in step.due:
                assert message.target == rank and message.due == at and message in posted
                self._take(message, (yield message), final)
                if message.flow in ("queries", "keys"):
                    arriving[message.flow] -= 1
            for message in step.sent:
                assert message.source == rank and message.due == at and message in posted
                yield message
            for message in (*step.sends, *step.receives):
                assert message.posted == at < message.due and message not in posted
                assert (message.source if message in step.sends else message.target) == rank
                assert message.source != message.target
                posted.add(message)
            arriving.update(message.flow for message in step.receives if message.flow in ("queries", "keys"))
            post(rank, {message: self._contents(message) for message in step.sends}, step.receives)
            for side in ("queries", "keys"):
                self.peak[side] = max(self.peak[side], sum(b.side == side for b in self.held) - 1 + arriving[side])
            if step.tile is not None:
                self._compute(step.tile)
            for share in step.done:
                _, rows = self.held.pop(share)
                used = hull(self.used.pop((share, "share")))
                assert used == (rows[0], rows[-1] + 1), "rows that no rank needs were sent"
        assert set(self.held) == {Share("queries", position), Share("keys", position)}, "shares are never freed"
        assert not self.partial and not self.used, "results never left"
        final[rank] = {side: self._rows_of_mine(side) for side in self.sides}
        return final

    def _rows_of_mine(self, side: Side, rank: int | None = None) -> np.ndarray:
        at = np.searchsorted(self.of_position[self.plan.position], self.mine if rank is None else self.of_rank[rank])
        return self.home[side][at]

    def _all_tokens_are_here(self) -> None:
        here = np.sort(np.concatenate(list(self.tokens.values())))
        assert np.array_equal(here, self.of_position[self.plan.position]), "tokens of the position are missing"

    def _contents(self, message: Message) -> object:
        if message.flow == "to_heads":
            assert message.rows == ((0, len(self.mine)),)
            return self.mine
        if message.flow == "from_heads":
            assert message.rows == ((0, len(self.of_rank[message.target])),)
            return {side: self._rows_of_mine(side, message.target) for side in self.sides}
        if message.flow in ("queries", "keys"):
            share = Share(message.flow, message.owner)
            self._all_tokens_are_here()
            if share.owner != self.plan.position:
                self.used[share, "share"].append(hull(message.rows))
            return self._tokens(share, message.rows)
        share = Share("queries" if message.flow == "query_results" else "keys", message.owner)
        assert share not in self.sent, "a result must be sent once"
        assert message.rows == self.plan.results[share] and hull(message.rows) == hull(
            self.used.pop((share, "results"))
        )
        self.sent.add(share)
        return self.partial.pop(share)

    def _tokens(self, share: Share, rows: Rows) -> np.ndarray:
        """Return the positions of some rows of a share."""
        tokens, held = self.held[share]
        assert set(flat(rows)) <= set(held.tolist()), "rows that are not held cannot be used"
        return tokens[np.searchsorted(held, flat(rows))]

    def _take(self, message: Message, payload, final: dict[int, dict[Side, np.ndarray]]) -> None:
        if message.flow == "to_heads":
            self.tokens[message.source] = payload
        elif message.flow == "from_heads":
            assert message.source not in final
            final[message.source] = payload
        elif message.flow in ("queries", "keys"):
            share = Share(message.flow, message.owner)
            assert share not in self.held
            rows = np.array(flat(message.rows))
            assert np.array_equal(payload, self.of_position[message.owner][rows])
            self.held[share] = (payload, rows)
        else:
            share = Share("queries" if message.flow == "query_results" else "keys", message.owner)
            self._add(share, message.rows, payload)

    def _add(self, share: Share, rows: Rows, counts: np.ndarray) -> None:
        """Add counts to the results for some rows of a share."""
        if share.owner == self.plan.position:
            self.home[share.side][flat(rows)] += counts
            return
        assert share not in self.sent, "a result was sent before it was complete"
        summed = flat(self.plan.results[share])
        at = np.searchsorted(summed, flat(rows))
        assert [summed[n] for n in at] == flat(rows) and list(at) == list(range(at[0], at[-1] + 1)), "one view of a sum"
        self.partial.setdefault(share, np.zeros((len(summed), len(self.visible)), int))[at] += counts
        self.used[share, "results"].append(hull(rows))

    def _compute(self, tile) -> None:
        self._all_tokens_are_here()
        self.tiles += 1
        ends = []
        for share, rows in (
            (Share("queries", tile.query_owner), tile.query_rows),
            (Share("keys", tile.key_owner), tile.key_rows),
        ):
            if share.owner != self.plan.position:
                self.used[share, "share"].append(hull(rows))
            ends.append((share, rows, self._tokens(share, rows)))
        (query, query_rows, queries), (key, key_rows, keys) = ends
        seen = self.visible[np.ix_(queries, keys)]
        assert seen[[0, -1]].any(1).all() and seen[:, [0, -1]].any(0).all(), "a row at a tile's edge takes no part"
        counts = np.zeros((len(queries), len(self.visible)), int)
        counts[:, keys] = seen
        self._add(query, query_rows, counts)
        if "keys" in self.sides:
            counts = np.zeros((len(keys), len(self.visible)), int)
            counts[:, queries] = seen.T
            self._add(key, key_rows, counts)


class Wires:
    """Transport between players. As on one NCCL stream a channel, a batch starts when the last one is done."""

    def __init__(self) -> None:
        self.batches: dict[tuple[int, Channel], deque[set[Message]]] = defaultdict(deque)
        self.contents: dict[Message, Any] = {}
        self.delivered: set[Message] = set()
        self.order: dict[tuple[Channel, int, int, str], list[Message]] = defaultdict(list)

    def post(self, rank: int, sends: dict[Message, object], receives: tuple[Message, ...]) -> None:
        assert not self.contents.keys() & sends.keys()
        self.contents |= sends
        batches: dict[Channel, set[Message]] = defaultdict(set)
        for end, messages in (("sent", sends), ("received", receives)):
            for message in messages:
                assert message.channel == (message.flow, "up" if message.source < message.target else "down")
                batches[message.channel].add(message)
                self.order[message.channel, message.source, message.target, end].append(message)
        for channel, batch in batches.items():
            self.batches[rank, channel].append(batch)

    def deliver(self) -> bool:
        """Deliver the messages that both ends have reached; return whether there was one."""
        found = False
        for (rank, channel), queue in self.batches.items():
            for message in [m for m in (queue[0] if queue else ()) if m.source == rank]:
                other = self.batches.get((message.target, channel))
                if other and message in other[0]:
                    self.delivered.add(message)
                    for line in (queue, other):
                        line[0].remove(message)
                        if not line[0]:
                            line.popleft()
                    found = True
        return found


def play(grid: CpGrid, layouts: Layouts, visibility: Visibility, direction: Pass) -> list[Player]:
    """Run all ranks of a plan to the end and assert everything that a plan promises."""
    num_tokens = sum(layout.num_tokens for layout in layouts)
    visible = whole(num_tokens, layouts[0].document_starts, visibility)
    schedule = Schedule(grid, layouts, visibility, direction)
    players = [Player(plan, grid, layouts, visible, direction) for plan in schedule.plans()]
    wires = Wires()
    running = {rank: player.run(wires.post) for rank, player in enumerate(players)}
    wanted: dict[int, Message | None] = dict.fromkeys(running)
    final = {}
    while running:
        moved = wires.deliver()
        for rank, run in list(running.items()):
            try:
                while wanted[rank] is None or wanted[rank] in wires.delivered:
                    moved = True
                    message = wanted[rank]
                    wanted[rank] = next(run) if message is None else run.send(wires.contents[message])
            except StopIteration as stop:
                final[rank] = stop.value
                del running[rank]
        assert moved, f"deadlock: {wanted}"
    assert not any(wires.batches.values()), "messages that only one end posted"
    for channel, source, target, end in list(wires.order):
        other = wires.order[channel, source, target, "received" if end == "sent" else "sent"]
        assert wires.order[channel, source, target, end] == other, "a channel's ends disagree about the order"
    for rank, player in enumerate(players):
        position = range(rank // grid.heads * grid.heads, (rank // grid.heads + 1) * grid.heads)
        assert set(final[rank]) == set(position), "each rank of a position has the results of its own heads"
        for results in final[rank].values():
            assert np.array_equal(results["queries"], visible[player.mine]), "each pair once, and at home"
            if direction == "backward":
                assert np.array_equal(results["keys"], visible.T[player.mine]), "each pair once, and at home"
        for side in ("queries", "keys"):
            assert player.peak[side] == player.plan.peak_shares(side)
    return players


def flat(rows: Rows) -> list[int]:
    return [row for start, stop in rows for row in range(start, stop)]


def hull(ranges: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return min(start for start, _ in ranges), max(stop for _, stop in ranges)


PROBLEMS = [
    (zigzag, Visibility(), False),
    (contiguous, Visibility(causal=False), False),
    (zigzag, Visibility(window=5), False),
    (zigzag, Visibility(), True),
    (scattered, Visibility(), True),
    (scattered, Visibility(window=5), False),
]


@pytest.mark.parametrize("size", by_lane(range(1, 17), quick=range(1, 6), slow=[9, 10, 12, 15, 16]))
def test_every_grid_keeps_its_promises(size, monkeypatch):
    for number, grid in enumerate(grids(size)):
        monkeypatch.setattr(visible, "GAP", (0, 2, 128)[number % 7 % 3])  # so few rows would always be joined
        cut, visibility, packed = PROBLEMS[number % len(PROBLEMS)]
        num_tokens = 2 * size + 5
        starts = (0, 3, 4, num_tokens // 2) if packed else (0,)
        # With many ranks there are many grids: they take forward and backward in turn, to stay within seconds.
        for direction in PASSES if size <= 12 else (PASSES[number // len(PROBLEMS) % 2],):
            play(grid, layouts_of(num_tokens, size, starts, cut), visibility, direction)


@st.composite
def problems(draw) -> tuple[CpGrid, Layouts, Visibility]:
    size = draw(st.integers(1, 16))
    grid = draw(st.sampled_from(list(grids(size))))
    num_tokens = 2 * size + draw(st.integers(0, 60))
    starts = (0, *sorted(draw(st.sets(st.integers(1, num_tokens - 1), max_size=6))))
    windows = st.builds(Visibility, st.just(True), st.integers(1, num_tokens))
    visibility = draw(st.one_of(st.just(Visibility()), st.just(Visibility(causal=False)), windows))
    by_work = of_packing("balanced", starts), of_packing("documents", starts), of_packing("documents", starts, 3)
    cut = draw(st.sampled_from([zigzag, contiguous, scattered, *by_work]))
    return grid, layouts_of(num_tokens, size, starts, cut), visibility


@given(problems(), st.sampled_from(PASSES), st.sampled_from([0, 1, 128]))
def test_any_documents_any_mask_any_runs(problem: tuple[CpGrid, Layouts, Visibility], direction: Pass, gap: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visible, "GAP", gap)
        play(*problem, direction)


@pytest.mark.parametrize("flow", ["keys", "queries"])
@pytest.mark.parametrize("gap", [0, 3])
def test_messages_carry_the_rows_that_are_needed(flow, gap, monkeypatch):
    """A rank gets the rows of a share with many runs that one of its tokens sees, or is seen by, and short gaps."""
    monkeypatch.setattr(visible, "GAP", gap)
    size, num_tokens, starts = 4, 400, tuple(range(0, 400, 23))
    grid = CpGrid(
        **{"kv" if flow == "keys" else "query": size, f"{'kv' if flow == 'keys' else 'query'}_route": "direct"}
    )
    layouts = layouts_of(num_tokens, size, starts, scattered)
    seen = whole(num_tokens, starts, Visibility())
    messages = sent(Schedule(grid, layouts, Visibility(), "forward").plans(), flow)
    assert max(len(message.rows) for message in messages) > 3
    for message in messages:
        mine, theirs = positions(layouts[message.owner]), positions(layouts[message.target])
        pairs = seen[np.ix_(theirs, mine)].any(0) if flow == "keys" else seen[np.ix_(mine, theirs)].any(1)
        needed = np.flatnonzero(pairs).tolist()
        assert set(needed) <= set(flat(message.rows)), "a row is missing"
        between = [a for (_, a), (b, _) in pairwise(message.rows) for a in [b - a]]
        assert all(rows > gap for rows in between), "runs that near are one"
        gaps = sum(after - row - 1 for row, after in pairwise(needed) if after - row - 1 <= gap)
        assert len(flat(message.rows)) == len(needed) + gaps, "rows that are not needed travel"


def sent(plans: list[RankPlan], flow: str) -> list[Message]:
    return [message for plan in plans for step in plan.steps for message in step.sends if message.flow == flow]


def num_rows(messages: list[Message]) -> int:
    return sum(len(flat(message.rows)) for message in messages)


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("size", by_lane([2, 3, 4, 6, 12], quick=[2, 3, 4, 6], slow=[12]))
def test_shares_held_at_a_time(size, direction):
    """With all tiles visible, a rank holds the share in use and those on their way along the axis that changes last,
    and all shares along the other axis, which is repeated for each of them."""
    coming = {"round": 1, "round_and_home": 1, "both_ways": 2}
    for grid in grids(size):
        plans = Schedule(grid, layouts_of(size, size, cut=contiguous), Visibility(causal=False), direction).plans()
        axes: tuple[tuple[Side, int, int, str, str], ...] = (
            ("queries", grid.query, grid.kv, grid.query_route, "r"),
            ("keys", grid.kv, grid.query, grid.kv_route, "c"),
        )
        for side, positions, others, route, first_letter in axes:
            bound = positions - 1
            if others == 1 or grid.order[0] == first_letter:
                bound = min(bound, 1 + coming.get(route, grid.in_flight))
            assert {plan.peak_shares(side) for plan in plans} == {bound}, f"{grid}, {side}"


@pytest.mark.parametrize("size", by_lane([3, 4, 6, 12], quick=[3, 4, 6], slow=[12]))
def test_results_on_their_way_at_a_time(size):
    """No more results than shares are on their way at one time: buffers do not pile up until the end."""
    at_a_time = {"round": 1, "round_and_home": 1, "both_ways": 2}
    for grid in grids(size):
        for plan in Schedule(
            grid, layouts_of(size, size, cut=contiguous), Visibility(causal=False), "backward"
        ).plans():
            flows: tuple[tuple[Flow, int, str], ...] = (
                ("query_results", grid.query, grid.query_route),
                ("key_results", grid.kv, grid.kv_route),
            )
            for flow, positions, route in flows:
                for messages in plan.messages(flow):
                    under_way = Counter(at for m in messages for at in range(m.posted, m.due))
                    bound = min(positions - 1, at_a_time.get(route, grid.in_flight))
                    assert max(under_way.values(), default=0) == bound, f"{grid}, {flow}"


@pytest.mark.parametrize("name", ["ring", "token_ring"])
def test_rings_of_any_size_hold_two_shares(name):
    for size in (3, 8, 64):
        plans = Schedule(NAMED[name](size), layouts_of(2 * size, size), Visibility(), "backward").plans()
        assert {(plan.peak_shares("queries"), plan.peak_shares("keys")) for plan in plans} == {
            (0, 2) if name == "ring" else (2, 0)
        }


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("size", [2, 3, 4, 8, 16])
@pytest.mark.parametrize(("name", "flow"), [("ring", "keys"), ("token_ring", "queries")])
def test_zigzag_saves_a_quarter(name, flow, size, direction):
    """A ring sends 0.75 (n - 1) shares a rank: half a share to positions after which only half is needed."""
    tokens = 8
    plans = Schedule(NAMED[name](size), layouts_of(tokens * size, size), Visibility(), direction).plans()
    assert num_rows(sent(plans, flow)) == 0.75 * (size - 1) * tokens * size
    # Direct results have the same rows as the shares. Results that are summed on their way have the rows of all stops
    # so far: the whole share except on the last hop of the early ranks.
    results = num_rows(sent(plans, flow.replace("queries", "query").replace("keys", "key") + "_results"))
    if name == "token_ring":
        assert results == 0.75 * (size - 1) * tokens * size
    elif direction == "backward":
        assert results == (1 - 0.5 / size) * (size - 1) * tokens * size
    else:
        assert results == 0


@pytest.mark.parametrize("size", by_lane([1, 2, 3, 4, 6, 8, 12], quick=[1, 2, 3, 4, 6], slow=[12]))
def test_every_position_computes_the_same_at_every_step(size):
    """Under a causal mask, zigzag tiles are half visible; diagonal ones have one chunk of pairs more."""
    chunk = 4
    layouts = layouts_of(2 * size * chunk, size)
    visible = whole(2 * size * chunk, (0,), Visibility())
    for grid in grids(size):
        schedule = Schedule(grid, layouts, Visibility(), "forward")
        of_position = [positions(layout) for layout in schedule.layouts]
        steps: dict[int, set[int]] = defaultdict(set)
        for plan in schedule.plans():
            for at, step in enumerate(plan.steps):
                if step.tile is not None:
                    pairs = np.ix_(of_position[step.tile.query_owner], of_position[step.tile.key_owner])
                    steps[at].add(int(visible[pairs].sum()))
                else:
                    steps[at].add(0)
        half = 2 * (grid.heads * chunk) ** 2
        assert [pairs for pairs in steps.values() if pairs != {0}] == [
            {half + grid.heads * chunk},
            *[{half}] * (grid.num_positions - 1),
        ], grid


@given(
    st.integers(1, 6), st.integers(1, 6), st.sampled_from(["rows", "rows_own_first", "columns", "columns_own_first"])
)
def test_tile_order(query, kv, order):
    tiles = tile_order(query, kv, order)
    assert sorted(tiles) == [(row, column) for row in range(query) for column in range(kv)]
    assert tiles[0] == (0, 0), "the own tile needs no message"
    lines = [tile["rc".index(order[0])] for tile in tiles[1:]]
    others = [line for line in lines if line]
    own = [line for line in lines if not line]
    assert lines == (own + sorted(others) if order.endswith("own_first") else sorted(others) + own)
    cells = [tile["cr".index(order[0])] for tile in tiles[1:]]
    assert all(b > a or line != after for (a, b), (line, after) in zip(pairwise(cells), pairwise(lines), strict=True))


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("size", by_lane([4, 8, 12], quick=[4], slow=[12]))
def test_documents_that_share_nothing_send_nothing(size, direction):
    """With one document a rank, each rank computes its own tile and exchanges no message."""
    layouts = layouts_of(4 * size, size, tuple(range(0, 4 * size, 4)), contiguous)
    for grid in grids(size):
        if grid.heads == 1:
            for player in play(grid, layouts, Visibility(), direction):
                assert player.tiles == 1 and not player.plan.channels and not player.plan.results


@pytest.mark.parametrize("direction", PASSES)
def test_a_document_of_two_ranks_moves_between_them_alone(direction):
    for route in ("both_ways", "direct"):
        grid = CpGrid(kv=8, kv_route=route)
        players = play(grid, layouts_of(32, 8, (0, 8, 16, 24), contiguous), Visibility(), direction)
        pairs = {(m.source, m.target) for m in sent([player.plan for player in players], "keys")}
        assert pairs == {(rank, rank + 1) for rank in range(0, 8, 2)}, "later ranks see the earlier ones"
        assert [player.tiles for player in players] == [1, 2] * 4


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("window", [1, 2, 5, 8])
def test_a_window_moves_a_halo(window, direction):
    """A rank with chunks of 8 tokens sends only the rows that an attention window reaches beyond an edge."""
    size = 6
    for axis, flow in (("query", "queries"), ("kv", "keys")):
        for route in ("both_ways", "direct"):
            grid = CpGrid(**{axis: size, f"{axis}_route": route})
            for cut, tokens in ((contiguous, 8), (zigzag, 16)):
                plans = Schedule(
                    grid, layouts_of(tokens * size, size, cut=cut), Visibility(window=window), direction
                ).plans()
                edges = size - 1 if cut is contiguous else 2 * size - 2  # the middle one lies within the last rank
                stops = Counter({message: num_rows([message]) for message in sent(plans, flow)})
                assert set(stops.values()) <= {window - 1}
                assert len(stops) == (edges if window > 1 else 0)


def test_a_layout_for_each_rank():
    with pytest.raises(ValueError, match="query=4 is for 4 ranks, and there are 3 layouts"):
        Schedule(CpGrid(query=4), layouts_of(12, 3), Visibility(), "forward")


@pytest.mark.parametrize("grid", [CpGrid(query=6), CpGrid(kv=6, kv_route="both_ways"), CpGrid(2, 3, 2)], ids=str)
def test_rows_of_many_ranks_are_computed_in_parts(monkeypatch, grid):
    layouts = [SeqLayout(zigzag(97, rank, grid.size).runs, (0, 11, 60)) for rank in range(grid.size)]
    at_once = Schedule(grid, layouts, Visibility(), "backward").plans()
    monkeypatch.setattr(schedules, "ROWS_AT_ONCE", 1)
    assert Schedule(grid, layouts, Visibility(), "backward").plans() == at_once


def test_both_passes_of_one_schedule_have_the_plans_of_two():
    layouts = [SeqLayout(zigzag(97, rank, 6).runs, (0, 11, 60)) for rank in range(6)]
    forward = Schedule(CpGrid(2, 3, 1), layouts, Visibility(), "forward")
    assert len(forward.all_messages.flow), "made before, and not those of the backward"
    backward = forward.turned("backward")
    alone = Schedule(CpGrid(2, 3, 1), layouts, Visibility(), "backward")
    assert backward.plans() == alone.plans()
    assert [x.tolist() for x in backward.all_messages] == [x.tolist() for x in alone.all_messages]
