"""The rules by which recorded calls are played: each finds the deadlocks that it is for, and no others."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers.nccl_rules import Call, deadlock, recorded
from torch.testing._internal.distributed.fake_pg import FakeStore

ALL = (0, 1, 2)


def batch(group: str, *messages: tuple[int, int]) -> Call:
    return Call((group,), f"batch on {group}", ALL, messages)


def collective(group: str, members: tuple[int, ...] = ALL) -> Call:
    return Call((group,), f"allreduce on {group}", members, None)


MADE = [collective("up"), collective("down")]
CROSSED = [
    [batch("up", (0, 1)), batch("down", (1, 0))],
    [batch("down", (1, 0)), batch("up", (0, 1))],
    [],
]


@pytest.mark.parametrize("rule", ["first use", "one queue"])
def test_crossed_batches_are_found(rule):
    found = deadlock([MADE + calls for calls in CROSSED], rule)
    assert found == ("rank 0 waits for rank 1 in call 2, batch on up; rank 1 waits for rank 0 in call 2, batch on down")


@pytest.mark.parametrize("rule", ["first use", "one queue"])
def test_one_order_is_not(rule):
    assert deadlock([MADE + calls for calls in (CROSSED[0], CROSSED[0], [])], rule) is None


def test_a_pair_that_has_met_blocks_no_host():
    met = [[*MADE, batch("up", (0, 1)), batch("down", (1, 0)), *calls] for calls in CROSSED[:2]]
    assert deadlock([*met, MADE], "first use") is None
    assert deadlock([*met, MADE], "one queue") is not None


@pytest.mark.parametrize(("rule", "hangs"), [("first use", True), ("one queue", False)])
def test_a_connection_ends_when_both_ends_have_met_all_their_peers(rule, hangs):
    """Rank 1 meets rank 0 while it waits for rank 2, which meets it only after rank 0 has gone on."""
    calls = [
        [*MADE, batch("up", (0, 1)), batch("down", (2, 0))],
        [*MADE, batch("up", (0, 1), (1, 2))],
        [*MADE, batch("down", (2, 0)), batch("up", (1, 2))],
    ]
    assert (deadlock(calls, rule) is not None) == hangs


def test_the_first_call_of_a_group_needs_all_its_members():
    """NCCL makes the communicator in it, and rank 2 never comes."""
    calls = [[batch("up", (0, 1))], [batch("up", (0, 1))], []]
    assert deadlock(calls, "one queue") is None
    with pytest.raises(AssertionError, match="batch on up: never comes on ranks \\[2\\]"):
        deadlock(calls, "first use")


@pytest.mark.parametrize("rule", ["first use", "one queue"])
def test_a_collective_by_another_algorithm_blocks_as_well(rule):
    """Ranks 0 and 1 have met on "up", and then meet first on "down": one of them before the collective."""
    met = [*MADE, batch("up", (0, 1))]
    crossed = [[batch("down", (0, 1)), collective("up")], [collective("up"), batch("down", (0, 1))], [collective("up")]]
    ranks = [met + crossed[0], met + crossed[1], MADE + crossed[2]]
    assert "allreduce on up" in (deadlock(ranks, rule) or "")


def test_a_batch_that_nccl_could_divide_is_refused():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        ops = [dist.P2POp(dist.isend, torch.zeros(1), 1)] * 257
        with recorded():
            dist.batch_isend_irecv(ops[:256])
            with pytest.raises(AssertionError, match="257 messages in a batch"):
                dist.batch_isend_irecv(ops)
    finally:
        dist.destroy_process_group()


def test_a_collective_that_a_member_leaves_out_is_named():
    with pytest.raises(AssertionError, match="rank 0, call 0, allreduce on all: never comes on ranks \\[2\\]"):
        deadlock([[collective("all")], [collective("all")], []], "one queue")
