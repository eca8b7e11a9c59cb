"""Training runs with planted faults, on processes of their own.

A fork server imports everything once, so that a start takes about a second. A fault happens to a rank at a position of
the watchdog, given by step and the beginning of the operation, or at a chunk that the rank writes in checkpoints. Files
that cannot be read or renamed are so from the beginning of the start.
"""

from __future__ import annotations

import errno
import fnmatch
import importlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from longring.launch.checkpoint.format import complete_checkpoints
from longring.launch.records import read_records
from safetensors.torch import load_file

from .ranks import become_rank, fork_server, variables_of

DEADLINE_S = 300
"""Bound on waits that take seconds: a machine with other load needs minutes."""
BATCH_TOKENS = 1024
"""Tokens of a step: two micro-batches of 256 tokens on each of two ranks."""
# The topology is named, since two runs that probe may choose different grids.
SMALL = [
    *("train.steps=12", "train.checkpoint_every_steps=3", f"train.global_batch_tokens={BATCH_TOKENS}"),
    *("parallel.tokens_per_rank=256", "parallel.cp.topology=full_mesh"),
]
EXACT = ("step", "tokens", "loss", "bucket", "cp", "learning_rate", "grad_norm")


class Fault(NamedTuple):
    """A fault of one rank at one position."""

    rank: int
    action: str
    """"hang", "pause", "clock", "memory", "drift" (one bit of a weight flips), a signal, "remove GLOB", "full FILE",
    "move FROM TO" or "times NUMBER".

    For the whole start: "unreadable NUMBER GLOB AFTER" lets this number of attempts to open files fail, after AFTER
    that have not; "unrenamed GLOB" lets a rename fail, and "renamed GLOB" reports one as failed that has happened.
    """
    step: int = 0
    operation: str = ""
    chunk: int = 0
    """Chunk of all that the rank writes in checkpoints, from 1; 0: the fault is at a step."""


class Run:
    """A run of twelve steps on two ranks, which may be started several times."""

    def __init__(self, recipe_file: Path, directory: Path, overrides: Sequence[str] = ()) -> None:
        self.path = directory / "run"
        self.output = directory / "output.txt"
        self.recipe_file = recipe_file
        self._overrides = overrides

    @property
    def overrides(self) -> list[str]:
        return [*SMALL, f"run_directory={self.path}", *self._overrides]

    def start(self, *faults: Fault, overrides: Sequence[str] = (), stop_after: int | None = None) -> list[int]:
        """Start both ranks and return their exit statuses."""
        self.output.unlink(missing_ok=True)
        return start(2, self.recipe_file, [*self.overrides, *overrides], self.output, faults, stop_after).wait()

    def finish(self, whole: Run | None = None) -> None:
        """Start the run until its end, and once more; check that it then equals itself and the run `whole`."""
        assert self.start() == [0, 0], self.said
        before = self.path / "metrics.jsonl", self.saved()
        metrics = before[0].read_text()
        assert self.start() == [0, 0], self.said
        assert "steps already: nothing to train" in self.said
        assert before[0].read_text() == metrics
        assert_equal(self.saved(), before[1])
        if whole is not None:
            assert self.metrics == whole.metrics
            assert_equal(self.saved(), whole.saved())

    def copy(self, directory: Path) -> Run:
        """Return a run that is as far as this one, in another directory."""
        other = Run(self.recipe_file, directory, self._overrides)
        shutil.copytree(self.path, other.path)
        return other

    @property
    def said(self) -> str:
        """All that the ranks of the last start printed, in one line."""
        return " ".join(self.output.read_text().split())

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "events.jsonl").read_text().splitlines()]

    @property
    def metrics(self) -> list[list[Any]]:
        return [[step[key] for key in EXACT] for step in read_records(self.path / "metrics.jsonl")]

    @property
    def outcomes(self) -> dict[int, str]:
        steps = read_records(self.path / "metrics.jsonl")
        assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
        return {step["step"]: step["outcome"] for step in steps if step["outcome"] != "good"}

    @property
    def checkpoints(self) -> list[str]:
        """Names of all that is in checkpoints/."""
        return sorted(path.name for path in (self.path / "checkpoints").iterdir())

    def saved(self, number: int = 0) -> dict[str, Any]:
        """Return every tensor of the last checkpoint, or of the `number`-th before it, by file and name."""
        path = complete_checkpoints(self.path / "checkpoints")[number]
        return {
            f"{file.name}/{key}": tensor
            for file in path.glob("*.safetensors")
            for key, tensor in load_file(file).items()
        }


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) for key in ours)


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
    own: Mapping[int, Sequence[str]] | None = None,
) -> Started:
    """Start all ranks of a run, which meet at `port` (0: any free one); their output goes to the file `output`.

    `own` has further overrides of single ranks.
    """
    stop = ["--stop-after", str(stop_after)] if stop_after else []
    settings = [[*overrides, *(own or {}).get(rank, [])] for rank in range(world_size)]
    return start_command("train", [[str(recipe_file), *words, *stop] for words in settings], output, faults, port)


def start_command(
    command: str, arguments: Sequence[Sequence[str]], output: Path, faults: Sequence[Fault] = (), port: int = 0
) -> Started:
    """Start the ranks of a command, a module of longring.launch, one for each list of arguments."""
    context = fork_server()
    if not port:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
    output.parent.mkdir(parents=True, exist_ok=True)
    processes: list[BaseProcess] = []
    for rank, words in enumerate(arguments):
        variables = {**os.environ, **variables_of(rank, len(arguments), port), "OMP_NUM_THREADS": "1"}
        started = (variables, command, list(words), tuple(faults), output)
        process = context.Process(target=_rank, args=started, daemon=True)
        process.start()
        processes.append(process)
    return Started(processes, output)


def _rank(
    variables: dict[str, str], command: str, arguments: list[str], faults: tuple[Fault, ...], output: Path
) -> None:
    become_rank(variables)
    with output.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    mine = [fault for fault in faults if fault.rank == int(variables["RANK"])]
    module: Any = importlib.import_module(f"longring.launch.{command}")
    for name in {"Watchdog", "Clock"} & vars(module).keys():
        setattr(module, name, _clock_with(mine, getattr(module, name)))
    if command == "train":
        module.build_engine = _build_with(mine, module.build_engine)
    _break_files(mine)
    sys.exit(module.main(arguments))


def _clock_with(faults: Sequence[Fault], clock: Any) -> type:
    class FaultyClock(clock):
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

    return FaultyClock


def _break_files(faults: Sequence[Fault]) -> None:
    """Let files fail to open and renames fail, or seem to; pauses between attempts take no time."""
    from longring.data import files

    files.time = SimpleNamespace(sleep=lambda _: None)
    opens, renames = Path.open, Path.rename
    broken = [fault for fault in faults if fault.action.startswith("unreadable ")]
    opened_before = dict.fromkeys(broken, 0)
    failure = errno.EIO, os.strerror(errno.EIO)

    def opened(self: Path, *arguments: Any, **options: Any) -> Any:
        for fault in broken:
            _, number, pattern, after = fault.action.split()
            if fnmatch.fnmatch(str(self), pattern):
                opened_before[fault] += 1
                if 0 < opened_before[fault] - int(after) <= int(number):
                    raise OSError(*failure, str(self))
        return opens(self, *arguments, **options)

    def renamed(self: Path, target: Any) -> Any:
        for fault in faults:
            action, _, pattern = fault.action.partition(" ")
            if action in ("renamed", "unrenamed") and fnmatch.fnmatch(str(self), pattern):
                if action == "renamed":
                    renames(self, target)
                raise OSError(*failure, str(self))
        return renames(self, target)

    Path.open, Path.rename = opened, renamed


class _Now:
    step = 0
    engine: Any = None


_now = _Now()


def _act(fault: Fault) -> None:
    if fault.action == "hang":
        time.sleep(3600)
    elif fault.action == "pause":
        time.sleep(1)
    elif fault.action == "drift":
        flip_a_bit(next(_now.engine.parameters()))
    elif fault.action.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, fault.action))
    elif fault.action.startswith("remove "):
        for file in Path("/").glob(fault.action.removeprefix("remove /")):
            file.unlink()
    elif fault.action.startswith("full "):  # writing to this file fails with the kernel's error of a full disk
        file = Path(fault.action.removeprefix("full "))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.symlink_to("/dev/full")
    elif fault.action.startswith("move "):
        source, target = fault.action.split()[1:]
        Path(source).rename(target)
    elif fault.action == "memory":
        import torch

        torch.empty(1 << 60)
    elif fault.action == "clock":
        jump, real = 1e9, time.time
        time.time = lambda: real() + jump
        time.sleep(5)  # so that the watchdog polls before the loop moves on


def flip_a_bit(tensor: Any) -> None:
    """Flip the lowest bit of the first element of a tensor of 16 or 32 bits."""
    import torch

    tensor.detach().view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).flatten()[0] ^= 1


def _build_with(faults: Sequence[Fault], build: Any) -> Any:
    """Return a builder of engines whose losses are multiplied by a number, such as "times nan", in a fault's step."""

    def spoil(module: Any, inputs: Any, losses: Any) -> Any:
        for fault in faults:
            if fault.action.startswith("times ") and fault.step == _now.step:
                losses = losses * float(fault.action.removeprefix("times "))
        return losses

    def build_and_spoil(*arguments: Any) -> Any:
        engine = _now.engine = build(*arguments)
        engine.module.register_forward_hook(spoil)
        return engine

    return build_and_spoil
