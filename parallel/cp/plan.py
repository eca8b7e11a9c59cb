"""Plans: one rank's part of a pass as data, the tile that it computes and the messages that it sends in each step.

- A *grid position* (i, j) is a point of the query x kv grid, number j x query + i; `heads` adjacent ranks hold it
  together, and rank = position x heads + index.
- A *share* is the rows of one grid position: its queries (with all that belongs to them) or its keys (with the values).
  The position is the *owner* of the share.
- A *row* of tiles is one owner's queries against all keys of the kv axis; a *column* is one owner's keys.

Every rank goes through a step in the same order:

    1. wait for the results that are due, merge them in the order listed, post the results to send and to receive;
    2. wait for the shares that are due, post the shares to send and to receive;
    3. compute the tile of the step, while the posted messages travel;
    4. free the shares that are not needed again.

Results come before shares, so that the results of the last tile leave while the rank still waits for the next share.

Both ends post a message at the same step and wait for it at the same step, and both ends of a channel have its messages
in the same order. So no two ranks can wait for each other, and the buffers of a message live from its post to its wait.
`schedules` makes plans, `execute` runs them, `cost` prices them; this module does not need torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from .rows import Rows
from .visible import Ints, Side

Pass = Literal["forward", "backward"]
PASSES: tuple[Pass, ...] = get_args(Pass)
Flow = Literal["queries", "keys", "query_results", "key_results", "to_heads", "from_heads"]
"""Content of a message.

| flow | forward | backward |
|---|---|---|
| `queries` | Q | Q, dO, lse, delta |
| `keys` | K, V | K, V |
| `query_results` | partial out, lse | partial dQ |
| `key_results` | | partial dK, dV |
| `to_heads`: own tokens, the target's heads | Q, K, V | dO |
| `from_heads`: the target's tokens, own heads | out | dQ, dK, dV |
"""
FLOWS: tuple[Flow, ...] = get_args(Flow)
"""All flows; arrays of messages hold indices into this."""
Channel = tuple[Flow, Literal["up", "down"]]
"""Flow and direction: up to a higher rank, or down. Messages of different channels never wait for each other."""
Link = tuple[Channel, int, int]
"""Channel, source and target of messages."""


class Message(NamedTuple):
    """Rows of one owner's share, or results for these rows, on their way from one rank to another."""

    flow: Flow
    owner: int
    """Grid position that owns the rows; for `to_heads` and `from_heads`, the rank that owns them."""
    rows: Rows
    """Ascending half-open runs of row numbers within the owner's share."""
    source: int
    target: int
    posted: int
    """Step at the start of which both ends post the message."""
    due: int
    """Step at the start of which both ends wait: the target for the content, the source to free its buffer."""

    @property
    def is_result(self) -> bool:
        """Whether the message carries results for a share."""
        return self.flow in ("query_results", "key_results")

    @property
    def is_trade(self) -> bool:
        """Whether the message trades heads; `heads` handles these, and all others belong to the query x kv grid."""
        return self.flow in ("to_heads", "from_heads")

    @property
    def share(self) -> Share:
        """Share that the message carries, or for which it carries results."""
        return Share("queries" if self.flow in ("queries", "query_results") else "keys", self.owner)

    @property
    def channel(self) -> Channel:
        """Channel on which the message travels."""
        return self.flow, "up" if self.target > self.source else "down"


class Messages(NamedTuple):
    """Many messages as columns, each `[n]`, one for each field of `Message`: a ring of 1,024 ranks has a million."""

    flow: Ints
    """Index into `FLOWS`."""
    owner: Ints
    start: Ints
    """First row."""
    stop: Ints
    """Row after the last; between the two rows may be left out."""
    num_rows: Ints
    leg: Ints
    """Number of the leg, from 0; 0 for trades of heads."""
    source: Ints
    target: Ints
    posted: Ints
    due: Ints

    @classmethod
    def of(cls, flow: Flow, owner: Any, span: Ints, num_rows: Ints, leg: Any, source: Any, target: Any,
           posted: Any, due: Any) -> Messages:  # fmt: skip
        """Return the messages of one flow that have rows. `span` is `[..., 2]`; other fields broadcast to `[...]`."""
        columns = (FLOWS.index(flow), owner, span[..., 0], span[..., 1], num_rows, leg, source, target, posted, due)
        # Where no rows are visible nothing is sent.
        not_empty = span[..., 0] < span[..., 1]
        return cls(*(np.broadcast_to(column, not_empty.shape)[not_empty] for column in columns))

    @classmethod
    def joined(cls, parts: Sequence[Messages]) -> Messages:
        """Return the concatenation of `parts`, in order."""
        none = cls(*np.zeros((len(cls._fields), 0), np.int64))  # np.concatenate needs at least one array
        return cls(*map(np.concatenate, zip(none, *parts, strict=True)))

    @property
    def is_result(self) -> NDArray[np.bool_]:
        """Mask of the messages that carry results for a share, `[n]`."""
        return np.isin(self.flow, [FLOWS.index("query_results"), FLOWS.index("key_results")])

    @property
    def posted_half(self) -> Ints:
        """Half of a step at which each message is posted: 2 x step for results, which come first, else one more."""
        return 2 * self.posted + ~self.is_result

    @property
    def due_half(self) -> Ints:
        """Half of a step at which each message is due, counted like `posted_half`."""
        return 2 * self.due + ~self.is_result

    def select(self, index: Any) -> Messages:
        """Return the messages at a numpy index (a slice, a mask or numbers)."""
        return Messages(*(column[index] for column in self))


class Tile(NamedTuple):
    """Kernel call: rows of one owner's queries against rows of one owner's keys."""

    query_owner: int
    query_rows: Rows
    key_owner: int
    key_rows: Rows


class Share(NamedTuple):
    """Name of a share: the queries, or the keys and values, of one grid position."""

    side: Side
    owner: int
    """Grid position."""


class Exchange(NamedTuple):
    """Messages of one half of a step: of its results, or of its shares and heads."""

    due: tuple[Message, ...]
    """Received messages to wait for, in the order in which they are merged."""
    sent: tuple[Message, ...]
    """Messages sent in earlier steps to wait for, whose buffers are then free."""
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a rank in a pass: messages to wait for and to post, and the tile that is computed meanwhile.

    The docstring of `longring.parallel.cp.plan` gives the order of its parts.
    """

    due: tuple[Message, ...]
    """Received messages to wait for."""
    sent: tuple[Message, ...]
    """Messages sent in earlier steps to wait for."""
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]
    tile: Tile | None
    done: tuple[Share, ...]
    """Shares of other grid positions that are freed after this step."""

    def exchanges(self) -> tuple[Exchange, Exchange]:
        """Return the two halves of the step: messages of results, then all others."""
        # Heads go with the shares: heads traded back contain the results that are due in the first half of the step.
        lists = (self.due, self.sent, self.sends, self.receives)
        return (
            Exchange(*(tuple(m for m in found if m.is_result) for found in lists)),
            Exchange(*(tuple(m for m in found if not m.is_result) for found in lists)),
        )


@dataclass(frozen=True)
class RankPlan:
    """One rank's part of a pass: its steps, whose messages the plans of their other ends have as well."""

    rank: int
    position: int
    """Grid position of the rank."""
    steps: tuple[Step, ...]
    results: dict[Share, Rows]
    """Rows of each foreign share for which this rank sums partial results and sends them."""

    def messages(self, flow: Flow) -> tuple[list[Message], list[Message]]:
        """Return the messages of one flow: (sent by this rank, received by it), in order of their posts."""
        sends = [message for step in self.steps for message in step.sends if message.flow == flow]
        return sends, [message for step in self.steps for message in step.receives if message.flow == flow]

    @property
    def channels(self) -> set[Channel]:
        """Channels on which this rank sends or receives."""
        return {message.channel for step in self.steps for message in (*step.sends, *step.receives)}

    def peak_shares(self, side: Side) -> int:
        """Return the largest number of foreign shares that this rank holds or receives at one time."""
        # A share counts from the step at which its message is posted, since its buffer exists from then on.
        held: set[Share] = set()
        peak = 0
        for step in self.steps:
            # Invariant: `held` has the shares that arrived or are arriving, less those freed after an earlier step.
            held |= {Share(side, message.owner) for message in step.receives if message.flow == side}
            peak = max(peak, len(held))
            held -= set(step.done)
        assert not held, f"rank {self.rank} never frees {held}"
        return peak
