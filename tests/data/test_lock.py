"""The lock on a file, whose holder may remove the file."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from longring.data import lock
from longring.data.lock import HeldError, held


def test_one_holds_the_lock_and_is_named(tmp_path: Path):
    file = tmp_path / "a" / "lock"
    for _ in range(2):
        with held(file), pytest.raises(HeldError, match=f"^process {os.getpid()} on .* since 2"):
            held(file).__enter__()


@pytest.mark.parametrize("made_again", [False, True])
def test_a_file_that_its_holder_removes_is_locked_under_its_name(tmp_path: Path, monkeypatch, made_again: bool):
    """The holder removes the file between this process's opening and locking, and a third process may make it again."""
    file, flock = tmp_path / "lock", fcntl.flock
    removed = []

    def remove_first(stream: object, operation: int) -> None:
        if not removed:
            file.unlink()
            removed.append(True)
            if made_again:
                file.touch()
        flock(stream, operation)  # type: ignore[arg-type]

    monkeypatch.setattr(lock.fcntl, "flock", remove_first)
    with held(file):
        assert removed
        with pytest.raises(HeldError):
            held(file).__enter__()
