"""Members in processes of their own, which take turns step by step, so that all meet the same machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Self

from .process import free_port

Steps = Callable[[], Generator[Any]]
"""Makes one rank of a member. The first value says that it is made; each later one takes a step and is its answer."""


def one_rank(steps: Steps, environment: dict[str, str], driver: Connection) -> None:
    """Make one rank; take a step whenever the driver says so, and send it the answer."""
    os.environ.update(environment)
    with closing(steps()) as answers:
        try:
            next(answers)
            driver.send(None)
        except Exception as error:
            return driver.send(f"{type(error).__name__}: {error}")
        while driver.recv():
            driver.send(next(answers))


class Turn(NamedTuple):
    """One step of a member."""

    seconds: float
    """Time until all ranks have answered."""
    answers: tuple[Any, ...]
    """Answer of each rank."""


class Member:
    """The processes of one member; a context manager that ends them.

    A member that waits is stopped, since idle threads of gloo would poll.
    """

    def __init__(self, steps: Steps, ranks: int) -> None:
        context, where = multiprocessing.get_context("spawn"), {"MASTER_ADDR": "127.0.0.1"}
        where |= {"MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        self._pipes, self._processes = [], []
        for rank in range(ranks):
            ours, its = context.Pipe()
            own = {**where, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=one_rank, args=(steps, own, its), daemon=True)
            process.start()
            its.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGCONT)
        for pipe in self._pipes:
            with suppress(OSError):  # a rank that ended with an error reads no more
                pipe.send(False)
        for process in self._processes:
            process.join(5)
            process.kill()

    def error(self) -> str | None:
        """Wait until the ranks are made; return the first error of one."""
        return next((found for found in [pipe.recv() for pipe in self._pipes] if found is not None), None)

    def step(self) -> Turn:
        """Take one step on all ranks."""
        self._signal(signal.SIGCONT)
        started = time.perf_counter()
        for pipe in self._pipes:
            pipe.send(True)
        answers = tuple(pipe.recv() for pipe in self._pipes)
        seconds = time.perf_counter() - started
        self._signal(signal.SIGSTOP)
        return Turn(seconds, answers)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)


def take_turns(members: dict[str, Member]) -> Iterator[dict[str, Turn]]:
    """Yield round after round, without end, the turn of every member; each round begins with another member."""
    names = list(members)
    while True:
        names = [*names[1:], names[0]]
        yield {name: members[name].step() for name in names}
