"""NCCL's rules of blocking, played over the calls that real ranks made.

`recorded` notes every call that a rank makes of any process group. Their order follows from the rank's program alone,
so a record over gloo, or over a fake group that carries nothing, is the order in which NCCL would get them. `deadlock`
plays the calls of all ranks by one of two rules, and finds the ranks that wait for each other: no time limit decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup

Rule = Literal["first use", "one queue"]
"""Rules of NCCL that block a rank.

- first use: NCCL's src/transport.cc. The first call of a communicator, the first message of a pair in a direction, and
  a collective by an algorithm that its communicator has not used before, block the host until the other ends are in the
  same call and have met their own other ends. NCCL chooses the algorithm by the size, so every collective counts as one
  that blocks: ranks that then end do so as well where some of them do not block.
- one queue: all communicators of a rank share one queue of the device, where every call blocks until the other ends
  have started. This is the worst case of few hardware queues.
"""
LARGEST_BATCH = 256
"""Largest number of messages in a batch. NCCL may divide a larger one differently on the ranks, which then hang
(github.com/pytorch/pytorch/pull/174942)."""
COLLECTIVES = (
    *("_allgather_base", "_reduce_scatter_base", "all_gather_single", "all_gather_single_coalesced"),
    *("all_to_all_single", "allgather", "allgather_coalesced", "allgather_into_tensor_coalesced", "allreduce"),
    *("allreduce_coalesced", "alltoall", "alltoall_base", "barrier", "broadcast", "gather", "reduce"),
    *("reduce_scatter", "reduce_scatter_single", "reduce_scatter_single_coalesced"),
    *("reduce_scatter_tensor_coalesced", "scatter"),
)
"""Methods of a process group that all of its ranks call."""


class Call(NamedTuple):
    """One call of a process group. Ranks are those of the world."""

    group: tuple[str, ...]
    """Name of the group and its members: the same on every member."""
    what: str
    members: tuple[int, ...]
    messages: tuple[tuple[int, int], ...] | None
    """(source, target) of each message of a batch; None: a collective."""


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Note every call of this process to a process group, in order, while the context is open.

    Raises AssertionError for a message outside a batch, for whose pair NCCL opens a communicator of its own, and for a
    batch of more than `LARGEST_BATCH`.
    """
    calls: list[Call] = []
    batch_of, originals = dist.batch_isend_irecv, {name: getattr(ProcessGroup, name) for name in COLLECTIVES}
    singles = {name: getattr(ProcessGroup, name) for name in ("send", "recv", "recv_anysource")}
    # What the class holds binds to its objects; what getattr gives does not.
    held = {name: vars(ProcessGroup)[name] for name in originals | singles}
    in_batch = False

    def note(group: ProcessGroup, what: str, messages: tuple[tuple[int, int], ...] | None) -> None:
        members = tuple(dist.get_process_group_ranks(group))
        calls.append(Call((group.group_name, *map(str, members)), f"{what} on {group.group_desc}", members, messages))

    def batch(ops):
        nonlocal in_batch
        assert len(ops) <= LARGEST_BATCH, f"{len(ops)} messages in a batch"
        rank = dist.get_rank()
        messages = tuple((rank, op.peer) if op.op is dist.isend else (op.peer, rank) for op in ops)
        note(ops[0].group, "batch", messages)
        in_batch = True
        try:
            return batch_of(ops)
        finally:
            in_batch = False

    def collective(name: str):
        def call(self, *args, **kwargs):
            note(self, name, None)
            return originals[name](self, *args, **kwargs)

        return call

    def single(name: str):
        def call(self, *args, **kwargs):
            assert in_batch, f"{name} outside a batch"
            return singles[name](self, *args, **kwargs)

        return call

    dist.batch_isend_irecv = batch
    for name in originals:
        setattr(ProcessGroup, name, collective(name))
    for name in singles:
        setattr(ProcessGroup, name, single(name))
    try:
        yield calls
    finally:
        dist.batch_isend_irecv = batch_of
        for name, method in held.items():
            setattr(ProcessGroup, name, method)


class End(NamedTuple):
    """One thing that a call takes part in: a collective, a message, or the making of a communicator."""

    key: tuple[object, ...]
    """Name that all ends share: the n-th collective of a group, or its n-th message from one rank to another."""
    others: Sequence[int]
    """Ranks at the other ends."""
    rule: Rule | None
    """The only rule under which the call blocks for it; None: both."""


def deadlock(ranks: Sequence[Sequence[Call]], rule: Rule) -> str | None:
    """Return the cycle of ranks that wait for each other, or None if all calls of all ranks end.

    `ranks` has the calls of each rank of the world. Raises AssertionError if the other end of a call never comes.
    """
    waits = _waits(ranks, rule)
    at = [0] * len(ranks)  # number of calls that each rank has ended
    met = [False] * len(ranks)  # whether all other ends of a rank's call have come to it

    def blocking(rank: int) -> list[int]:
        """Return the ranks for which a rank waits in its call."""
        others = waits[rank][at[rank]]
        # NCCL ends a connection with a message to each new peer, which a rank sends after it has met all of its own.
        if met[rank] and rule == "first use":
            return [other for other, index in others if at[other] == index and not met[other]]
        return [] if met[rank] else [other for other, index in others if at[other] < index]

    moved = True
    while moved:
        moved = False
        for rank, of_rank in enumerate(waits):
            while at[rank] < len(of_rank) and not blocking(rank):
                moved = True
                at[rank] += met[rank]
                met[rank] = not met[rank]
    stuck = [rank for rank, of_rank in enumerate(waits) if at[rank] < len(of_rank)]
    if not stuck:
        return None
    path = [stuck[0]]
    while (after := blocking(path[-1])[0]) not in path:
        path.append(after)
    cycle = path[path.index(after) :]
    return "; ".join(
        f"rank {rank} waits for rank {other} in call {at[rank]}, {ranks[rank][at[rank]].what}"
        for rank, other in zip(cycle, [*cycle[1:], cycle[0]], strict=True)
    )


def _waits(ranks: Sequence[Sequence[Call]], rule: Rule) -> list[list[list[tuple[int, int]]]]:
    """Return what blocks each call of each rank under a rule: other ranks, and the index of the call of each."""
    ends = [
        [[end for end in of_call if end.rule in (None, rule)] for of_call in _ends(rank, calls)]
        for rank, calls in enumerate(ranks)
    ]
    indices = [{end.key: at for at, of_call in enumerate(of_rank) for end in of_call} for of_rank in ends]
    for rank, of_rank in enumerate(ends):
        for at, end in ((at, end) for at, of_call in enumerate(of_rank) for end in of_call):
            missing = [other for other in end.others if end.key not in indices[other]]
            assert not missing, f"rank {rank}, call {at}, {ranks[rank][at].what}: never comes on ranks {missing}"
    return [
        [[(other, indices[other][end.key]) for end in of_call for other in end.others] for of_call in of_rank]
        for of_rank in ends
    ]


def _ends(rank: int, calls: Sequence[Call]) -> list[list[End]]:
    """Return what each call of a rank takes part in."""
    count: Counter[tuple[object, ...]] = Counter()
    found = []
    for call in calls:
        others = [member for member in call.members if member != rank]
        # The first call of a group makes its communicator, whatever the call, and blocks the host.
        ends = [] if count[call.group] else [End((call.group, "made"), others, "first use")]
        count[call.group] += 1
        for message in (None,) if call.messages is None else call.messages:
            key = (call.group, message)
            count[key] += 1
            if message is None:
                ends.append(End((*key, count[key]), others, None))
            else:
                [other] = {*message} - {rank}
                ends.append(End((*key, count[key]), [other], None if count[key] == 1 else "one queue"))
        found.append(ends)
    return found


def messages_of(calls: Sequence[Call]) -> set[tuple[object, ...]]:
    """Return (group, source, target) of every message."""
    return {(call.group, *message) for call in calls for message in call.messages or ()}
