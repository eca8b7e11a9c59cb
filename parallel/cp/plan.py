"""A schedule as data: for each rank and step the tile it computes and the messages it sends, before anything moves.

Words. A *place* is a point of the query x kv grid; `heads` ranks share it. A *block* is one place's rows of the queries
(with what belongs to them) or of the keys (keys and values). A *row* of tiles is one owner's queries against all keys
of the kv axis, a *column* one owner's keys. Place (i, j) is number j x query + i, and rank (place x heads + shard).

A step, on every rank alike:

    1. wait for the results that are due, merge them in the order listed, and post those to be sent and received;
    2. wait for the blocks that are due, and post those to be sent and received;
    3. compute the step's tile, while all of these travel;
    4. let go of the blocks that are not needed again.

Results come first, so that those of the tile before leave while its rank still waits for the next block.

Both ends post a message at the same step and wait for it at the same step, and each channel has its messages in the
same order at both: so no rank can wait for one that waits for it, and the memory of a message lives from its post to
its wait. `schedules` makes plans, `execute` runs them, `cost` plays them; no torch is needed to think about one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from .visible import Ints, Rows

Pass = Literal["forward", "backward"]
Side = Literal["queries", "keys"]
Flow = Literal["queries", "keys", "query_results", "key_results", "to_heads", "from_heads"]
"""What a message carries.

| flow | forward | backward |
|---|---|---|
| `queries` | Q | Q, dO, lse, delta |
| `keys` | K, V | K, V |
| `query_results` | partial out, lse | partial dQ |
| `key_results` | | partial dK, dV |
| `to_heads`: tokens for heads | Q, K, V | dO |
| `from_heads`: heads for tokens | out | dQ, dK, dV |
"""
FLOWS: tuple[Flow, ...] = get_args(Flow)
Channel = tuple[Flow, Literal["up", "down"]]
"""One direction of a flow, to a higher or a lower rank: no message waits for one that goes another way."""


class Message(NamedTuple):
    """Rows of one owner's block, or results for them, from one rank to another."""

    flow: Flow
    owner: int
    """Place whose rows they are; for the flows of heads, the rank."""
    rows: Rows
    source: int
    target: int
    posted: int
    """Step at whose start both ends post it."""
    due: int
    """Step at whose start both ends wait for it: the target to have it, the source to have its memory back."""

    @property
    def is_result(self) -> bool:
        """Whether it carries results for a block."""
        return self.flow in ("query_results", "key_results")

    @property
    def channel(self) -> Channel:
        """Where it travels."""
        return self.flow, "up" if self.target > self.source else "down"


class Messages(NamedTuple):
    """Many messages as columns, one array for each field: a ring of 1,024 ranks has a million."""

    flow: Ints
    """Index into `FLOWS`."""
    owner: Ints
    start: Ints
    stop: Ints
    source: Ints
    target: Ints
    posted: Ints
    due: Ints

    @classmethod
    def of(cls, flow: Flow, owner: Any, rows: Ints, source: Any, target: Any, posted: Any, due: Any) -> Messages:
        """Messages of one flow; fields that all share may be one number. Those without rows are none."""
        columns = (FLOWS.index(flow), owner, rows[..., 0], rows[..., 1], source, target, posted, due)
        there = rows[..., 0] < rows[..., 1]
        return cls(*(np.broadcast_to(column, there.shape)[there] for column in columns))

    @classmethod
    def joined(cls, parts: Sequence[Messages]) -> Messages:
        """One after the other."""
        none = cls(*np.zeros((len(cls._fields), 0), np.int64))
        return cls(*map(np.concatenate, zip(none, *parts, strict=True)))

    @property
    def is_result(self) -> NDArray[np.bool_]:
        """Which of them carry results for a block."""
        return np.isin(self.flow, [FLOWS.index("query_results"), FLOWS.index("key_results")])

    def where(self, chosen: Any) -> Messages:
        """Those at an index."""
        return Messages(*(column[chosen] for column in self))

    def one_by_one(self) -> list[Message]:
        """Each as a `Message`."""
        return [
            Message(FLOWS[flow], owner, (start, stop), *rest)
            for flow, owner, start, stop, *rest in zip(*(column.tolist() for column in self), strict=True)
        ]


class Tile(NamedTuple):
    """Rows of one place's queries against rows of one place's keys."""

    query_owner: int
    query_rows: Rows
    key_owner: int
    key_rows: Rows


class Block(NamedTuple):
    """A block that travels to a rank, or what a rank computes for one that is not its own."""

    side: Side
    owner: int


class Exchange(NamedTuple):
    """The messages of one half of a step."""

    due: tuple[Message, ...]
    gone: tuple[Message, ...]
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """What a rank does between one wait and the next."""

    due: tuple[Message, ...]
    gone: tuple[Message, ...]
    """Sends of earlier steps that are due."""
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]
    tile: Tile | None
    done: tuple[Block, ...]
    """Blocks of others that are held no longer after this step."""

    def exchanges(self) -> tuple[Exchange, Exchange]:
        """Of results, then of everything else."""
        lists = (self.due, self.gone, self.sends, self.receives)
        return (
            Exchange(*(tuple(m for m in found if m.is_result) for found in lists)),
            Exchange(*(tuple(m for m in found if not m.is_result) for found in lists)),
        )


@dataclass(frozen=True)
class RankPlan:
    """One rank's part of a pass."""

    rank: int
    place: int
    steps: tuple[Step, ...]
    results: dict[Block, Rows]
    """Rows of others' blocks for which this rank computes partial results, and sends them on."""

    def messages(self, flow: Flow) -> tuple[list[Message], list[Message]]:
        """Those of one flow that it sends, and that it receives."""
        sends = [message for step in self.steps for message in step.sends if message.flow == flow]
        return sends, [message for step in self.steps for message in step.receives if message.flow == flow]

    @property
    def channels(self) -> set[Channel]:
        """Those that this rank sends or receives on."""
        return {message.channel for step in self.steps for message in (*step.sends, *step.receives)}

    def peak_blocks(self, side: Side) -> int:
        """Most blocks of others that this rank holds, or is receiving, at a time."""
        held: set[Block] = set()
        peak = 0
        for step in self.steps:
            held |= {Block(side, message.owner) for message in step.receives if message.flow == side}
            peak = max(peak, len(held))
            held -= set(step.done)
        assert not held, f"rank {self.rank} never lets go of {held}"
        return peak
