"""Members of benchmarks/lib/turns.py: ranks in processes of their own, rounds that begin with another one each time."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from itertools import islice

from helpers.turns import broken, counted
from lib.turns import Member, take_turns


def test_members_take_turns(tmp_path):
    log = tmp_path / "log"
    with ExitStack() as stack:
        members = {
            name: stack.enter_context(Member(partial(counted, log, name), ranks))
            for name, ranks in (("a", 1), ("b", 2))
        }
        assert [member.error() for member in members.values()] == [None, None]
        rounds = list(islice(take_turns(members), 3))
    assert log.read_text() == "bba" + "abb" + "bba"
    for number, turns in enumerate(rounds, 1):
        assert turns["a"].answers == (("a", "0", number),)
        assert turns["b"].answers == (("b", "0", number), ("b", "1", number))
        assert all(turn.seconds > 0 for turn in turns.values())


def test_a_rank_that_cannot_be_made_is_an_error():
    with Member(broken, 2) as member:
        assert member.error() == "ValueError: no data"
