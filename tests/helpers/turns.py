"""Ranks of members that take turns, in a module that a spawned process can import."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path


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
