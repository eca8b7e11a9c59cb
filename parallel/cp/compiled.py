"""Compiled plans: one rank's part of a pass as a flat list of operations on numbered slots.

A plan says what a rank does in each step. `compile_plan` resolves once, for all layers and passes of a sequence, where
every tensor of it lies and how long it lives; `execute` walks the list. A slot holds the tensors of a share, sums of
results, the content of a message, or a view of some rows of another slot. Slots and rows are integers, so the list
serves tensors of any shape, and needs no torch. It is what a CUDA graph of a pass would capture.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from ...kernels.layout import SeqLayout
from .plan import Exchange, Flow, Message, RankPlan, Share, Side, Tile
from .rows import Rows, num_rows, packed

OWN: dict[Side, int] = {"queries": 0, "keys": 1}
"""Slots of the tensors of the rank's own grid position."""
HOME: dict[Side, int] = {"queries": 2, "keys": 3}
"""Slots of the sums of all results for the own shares."""


class View(NamedTuple):
    """Slot that is a view of adjacent rows of another one, counted from its first row."""

    slot: int
    source: int
    start: int
    num_rows: int


class NewSum(NamedTuple):
    """Slot for sums of results for rows of a foreign share, without any result yet."""

    slot: int
    side: Side
    num_rows: int


class Send(NamedTuple):
    """Content of a message, taken from the slot `source` and kept in `slot` until it has been sent."""

    message: Message
    slot: int
    source: int
    rows: Rows | None
    """Rows of `source`, counted from its first; None: all."""


class Receive(NamedTuple):
    """Buffer of a message, in a slot."""

    message: Message
    slot: int
    num_rows: int
    is_share: bool
    """Whether it is a share, which tiles read; otherwise a result, which is merged."""


class Post(NamedTuple):
    """Start of the messages of one half of a step, in the order of their channels; each tile has a post before it."""

    sends: tuple[Send, ...]
    receives: tuple[Receive, ...]


class Wait(NamedTuple):
    """Point at which a message must have been sent, or have arrived."""

    message: Message


class Merge(NamedTuple):
    """Merging of adjacent results of a message, in the slot `part` from row `start` on, into a slot of their rows."""

    into: int
    part: int
    start: int
    num_rows: int


class Compute(NamedTuple):
    """Computation of a tile from slots of queries and keys into slots of results for both."""

    tile: Tile
    queries: int
    keys: int
    query_results: int
    key_results: int


class Free(NamedTuple):
    """Release of the tensors in some slots."""

    slots: tuple[int, ...]


Operation = View | NewSum | Post | Wait | Merge | Compute | Free


class Trade(NamedTuple):
    """Messages by which this rank trades tokens for heads, or back."""

    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


@dataclass(frozen=True)
class CompiledPlan:
    """One rank's part of a pass."""

    rank: int
    num_slots: int
    operations: tuple[Operation, ...]
    """Operations on the query x kv grid, between the trades."""
    trades: dict[Flow, Trade]
    """Trades of heads, by flow."""
    run_tokens: list[int]
    """Number of tokens of each run of adjacent tokens that one rank holds, in the order of the position's tokens."""
    runs_of: dict[int, list[int]]
    """Runs of each rank of the grid position, by rank, in order."""

    @property
    def tiles(self) -> list[Tile]:
        """Tiles in the order of computation."""
        return [operation.tile for operation in self.operations if isinstance(operation, Compute)]


def compile_plan(plan: RankPlan, layout: SeqLayout, ranks: dict[int, SeqLayout]) -> CompiledPlan:
    """Return the compiled plan of a rank whose grid position has `layout`; `ranks` are those of the position."""
    compiler = _Compiler(plan, layout.num_tokens)
    for step in plan.steps:
        results, shares = step.exchanges()
        compiler.exchange(results, always=False)
        compiler.exchange(shares, always=step.tile is not None)
        if step.tile is not None:
            compiler.compute(step.tile)
        for share in step.done:
            compiler.free(compiler.shares.pop(share))
    assert not compiler.shares and not compiler.sums and not compiler.travelling, "the plan frees everything"
    flows: tuple[Flow, ...] = ("to_heads", "from_heads")
    trades: dict[Flow, Trade] = {flow: Trade(*map(tuple, plan.messages(flow))) for flow in flows}
    runs = sorted(run for of in ranks.values() for run in of.runs)  # in the order of the position's tokens
    runs_of = {rank: [runs.index(run) for run in of.runs] for rank, of in sorted(ranks.items())}
    run_tokens = [stop - start for start, stop in runs]
    return CompiledPlan(plan.rank, len(compiler.spans), tuple(compiler.operations), trades, run_tokens, runs_of)


@dataclass
class _Compiler:
    """Operations so far, and the slots that are in use."""

    plan: RankPlan
    num_tokens: int
    operations: list[Operation] = field(default_factory=list)
    spans: list[Rows] = field(init=False)
    """Rows of the owner's share that each slot holds, but for views."""
    views: dict[int, dict[tuple[int, int], int]] = field(default_factory=dict)
    """Slots that are views of each slot, by their rows, counted from its first."""
    shares: dict[Share, int] = field(default_factory=dict)
    """Slots of foreign shares."""
    sums: dict[Share, int] = field(default_factory=dict)
    """Slots of sums of results for foreign shares."""
    travelling: dict[Message, int] = field(default_factory=dict)
    """Slots of the buffers of messages, from post to wait."""

    def __post_init__(self) -> None:
        self.spans = [((0, self.num_tokens),)] * 4  # OWN and HOME: all rows

    def slot(self, rows: Rows) -> int:
        """Return the number of a new slot for rows of a share."""
        self.spans.append(rows)
        return len(self.spans) - 1

    def part(self, source: int, rows: Rows) -> int:
        """Return the slot of `rows` of a share, which lie side by side in `source`."""
        [run] = packed(self.spans[source], rows)
        return self.view(source, run)

    def view(self, source: int, run: tuple[int, int]) -> int:
        """Return the slot of adjacent rows of `source`, counted from its first; each view is made once."""
        start, stop = run
        if (start, stop) == (0, num_rows(self.spans[source])):
            return source
        views = self.views.setdefault(source, {})
        if run not in views:
            views[run] = self.slot(())
            self.operations.append(View(views[run], source, start, stop - start))
        return views[run]

    def free(self, slot: int) -> None:
        """Free a slot and all views of it."""
        slots, last = (slot, *self.views.pop(slot, {}).values()), self.operations[-1]
        if isinstance(last, Free):
            self.operations[-1] = Free((*last.slots, *slots))
        else:
            self.operations.append(Free(slots))

    def share(self, share: Share, rows: Rows) -> int:
        """Return the slot of rows of a share, own or foreign."""
        return self.part(OWN[share.side] if share.owner == self.plan.position else self.shares[share], rows)

    def sum_of(self, share: Share) -> int:
        """Return the slot of the results for a share; foreign sums begin at their first use."""
        if share.owner == self.plan.position:
            return HOME[share.side]
        if share not in self.sums:
            rows = self.plan.results[share]
            self.sums[share] = self.slot(rows)
            self.operations.append(NewSum(self.sums[share], share.side, num_rows(rows)))
        return self.sums[share]

    def results(self, share: Share, rows: Rows) -> int:
        """Return the slot of rows of the results for a share."""
        if share.owner != self.plan.position and share not in self.plan.results:
            return HOME["keys"]  # in the forward keys have no results
        return self.part(self.sum_of(share), rows)

    def merge(self, message: Message, part: int) -> None:
        """Add the operations that merge the results of a message, each run of rows by itself."""
        into, at = self.sum_of(message.share), 0  # at: rows of the message before the run
        for run in packed(self.spans[into], message.rows):
            self.operations.append(Merge(self.view(into, run), part, at, run[1] - run[0]))
            at += run[1] - run[0]

    def exchange(self, exchange: Exchange, *, always: bool) -> None:
        """Add the operations of one half of a step; a post without messages only if `always`."""
        if not any(exchange) and not always:
            return
        # Trades of heads are not in this list: `heads` carries them out.
        due, sent, sends, receives = ([m for m in found if not m.is_trade] for found in exchange)
        # Every wait of the exchange comes before its posts: both ends of a message keep this order.
        spent: list[int] = []  # slots of merged results and of sent messages
        for message in due:
            self.operations.append(Wait(message))
            slot = self.travelling.pop(message)
            if message.is_result:
                self.merge(message, slot)
                spent.append(slot)
            else:
                self.shares[message.share] = slot
        for message in sent:
            self.operations.append(Wait(message))
            spent.append(self.travelling.pop(message))
        for slot in spent:
            self.free(slot)
        # After the merges above: a partial result that is sent now holds all that has come for it.
        if sends or receives or always:
            into = tuple(self._receive(message) for message in sorted(receives, key=_channel))
            out = tuple(self._send(message) for message in sorted(sends, key=_channel))
            self.operations.append(Post(out, into))
            # The slot of the message keeps the tensors that are sent; the slot of the sum is not needed any more.
            for message in filter(lambda m: m.is_result, sends):
                self.free(self.sums.pop(message.share))

    def compute(self, tile: Tile) -> None:
        """Add the operations of a tile."""
        queries, keys = Share("queries", tile.query_owner), Share("keys", tile.key_owner)
        slots = self.share(queries, tile.query_rows), self.share(keys, tile.key_rows)
        results = self.results(queries, tile.query_rows), self.results(keys, tile.key_rows)
        self.operations.append(Compute(tile, *slots, *results))

    def _travel(self, message: Message) -> int:
        self.travelling[message] = self.slot(message.rows)
        return self.travelling[message]

    def _receive(self, message: Message) -> Receive:
        return Receive(message, self._travel(message), num_rows(message.rows), not message.is_result)

    def _send(self, message: Message) -> Send:
        slot = self._travel(message)
        if message.is_result:
            return Send(message, slot, self.sums[message.share], None)
        # One run of the own share is a view, which other messages and tiles may use as well.
        if message.owner == self.plan.position and len(message.rows) == 1:
            return Send(message, slot, self.share(message.share, message.rows), None)
        source = OWN[message.share.side] if message.owner == self.plan.position else self.shares[message.share]
        held = self.spans[source]
        return Send(message, slot, source, None if message.rows == held else packed(held, message.rows))


def _channel(message: Message) -> tuple[str, str]:
    return message.channel
