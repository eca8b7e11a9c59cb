"""Members of benchmarks/lib/turns.py: ranks in processes of their own, rounds that begin with another one each time."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path

from lib.turns import Member, take_turns


def counted(log: Path, name: str) -> Generator[tuple[str, str, int] | None, None, None]:
    """Log each step of a rank; answer its name, its rank and the number of its steps."""
    yield None
    for number in range(1, 100):
        with log.open("a") as file:
            file.write(name)
        yield name, os.environ["RANK"], number


def broken() -> Generator[None, None, None]:
    """Fail before the rank is made."""
    raise ValueError("no data")
    yield


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
