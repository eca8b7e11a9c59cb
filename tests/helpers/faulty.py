"""Training runs with planted faults, on processes of their own.

A fork server imports everything once, so that a start takes about a second. A fault happens to a rank at a position of
the watchdog, given by step and the beginning of the operation, or at a chunk that the rank writes in checkpoints.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from .ranks import fork_server, take_environment, variables_of

DEADLINE_S = 120


class Fault(NamedTuple):
    """A fault of one rank at one position."""

    rank: int
    action: str
    """"hang", "pause", "clock", a signal, "remove GLOB", "full FILE" or "times NUMBER"."""
    step: int = 0
    operation: str = ""
    chunk: int = 0
    """Chunk of all that the rank writes in checkpoints, from 1; 0: the fault is at a step."""


class Started(NamedTuple):
    """The ranks of one start."""

    processes: list[BaseProcess]
    output: Path

    def wait(self) -> list[int]:
        """Return the exit statuses by rank, negative for a signal. Ranks that do not end in time fail the test."""
        deadline = time.monotonic() + DEADLINE_S
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.end()
        assert not late, f"ranks {late} did not end: {self.output.read_text()}"
        return [process.exitcode or 0 for process in self.processes]

    def end(self) -> None:
        """Kill the ranks that still run."""
        for process in self.processes:
            process.kill()
            process.join()


def start(
    world_size: int,
    recipe_file: Path,
    overrides: Sequence[str],
    output: Path,
    faults: Sequence[Fault] = (),
    stop_after: int | None = None,
    port: int = 0,
) -> Started:
    """Start all ranks of a run, which meet at `port` (0: any free one); their output goes to the file `output`."""
    context = fork_server()
    if not port:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
    output.parent.mkdir(parents=True, exist_ok=True)
    processes: list[BaseProcess] = []
    for rank in range(world_size):
        variables = {**os.environ, **variables_of(rank, world_size, port), "OMP_NUM_THREADS": "1"}
        arguments = [str(recipe_file), *overrides, *(["--stop-after", str(stop_after)] if stop_after else [])]
        process = context.Process(target=_rank, args=(variables, arguments, tuple(faults), output), daemon=True)
        process.start()
        processes.append(process)
    return Started(processes, output)


def _rank(variables: dict[str, str], arguments: list[str], faults: tuple[Fault, ...], output: Path) -> None:
    take_environment(variables)
    with output.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch
    from longring.launch import train

    torch.set_num_threads(1)
    mine = [fault for fault in faults if fault.rank == int(variables["RANK"])]
    train.Watchdog = _watchdog_with(mine)
    train.build_engine = _build_with(mine, train.build_engine)
    sys.exit(train.main(arguments))


def _watchdog_with(faults: Sequence[Fault]) -> type:
    from longring.launch.ranks.watchdog import Watchdog

    class FaultyWatchdog(Watchdog):
        chunks = 0

        def at(self, step: int, operation: str) -> None:
            super().at(step, operation)
            _now.step = step
            for fault in faults:
                if not fault.chunk and fault.step == step and operation.startswith(fault.operation):
                    _act(fault)

        def alive(self) -> None:
            super().alive()
            self.chunks += 1
            for fault in faults:
                if fault.chunk == self.chunks:
                    _act(fault)

    return FaultyWatchdog


class _Now:
    step = 0


_now = _Now()


def _act(fault: Fault) -> None:
    if fault.action == "hang":
        time.sleep(3600)
    elif fault.action == "pause":
        time.sleep(1)
    elif fault.action.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, fault.action))
    elif fault.action.startswith("remove "):
        for file in Path("/").glob(fault.action.removeprefix("remove /")):
            file.unlink()
    elif fault.action.startswith("full "):  # writing to this file fails with the kernel's error of a full disk
        file = Path(fault.action.removeprefix("full "))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.symlink_to("/dev/full")
    elif fault.action == "clock":
        jump, real = 1e9, time.time
        time.time = lambda: real() + jump
        time.sleep(5)  # so that the watchdog polls before the loop moves on


def _build_with(faults: Sequence[Fault], build: Any) -> Any:
    """Return a builder of engines whose losses are multiplied by a number, such as "times nan", in a fault's step."""

    def spoil(module: Any, inputs: Any, losses: Any) -> Any:
        for fault in faults:
            if fault.action.startswith("times ") and fault.step == _now.step:
                losses = losses * float(fault.action.removeprefix("times "))
        return losses

    def build_and_spoil(*arguments: Any) -> Any:
        engine = build(*arguments)
        engine.module.register_forward_hook(spoil)
        return engine

    return build_and_spoil
