"""Names the rank, the step and the operation that hang, and ends the run.

A thread of each rank looks at where the train loop has come to. When nothing has moved for too long, it leaves a report
in the run directory, waits for those of the other ranks, compares, and ends the process. A rank that is stopped or gone
leaves no report, and is named for that. Times are of the monotonic clock: setting the machine's clock changes nothing.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from ..checkpoint.format import complete_checkpoints
from ..errors import GO_ON_LATER
from ..run_directory import RunDirectory
from .rank import is_lost_peer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """Where a rank is. All ranks pass the same positions in the same order, so a smaller number is further behind."""

    number: int
    step: int
    operation: str

    def __str__(self) -> str:
        return f"step {self.step}, {self.operation}"


class Watchdog:
    """Watches this process within a `with`. `limit_s` 0: it never ends anything."""

    def __init__(self, run: RunDirectory, rank: int, world_size: int, limit_s: float) -> None:
        self._run = run
        self._rank = rank
        self._world_size = world_size
        self._limit_s = limit_s
        self.position = Position(0, 0, "starting")
        """Where the train loop has come to."""
        self._moved = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._limit_s:
            self._report_file(self._rank).unlink(missing_ok=True)
            self._thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Raises ConnectionError, with where this rank was, for what a collective raises when another rank is gone."""
        self._ended.set()
        if self._limit_s:
            self._thread.join()
        if isinstance(error, RuntimeError) and is_lost_peer(error):
            saved = next((path.name for path in complete_checkpoints(self._run.checkpoints)), "none yet")
            raise ConnectionError(
                f"rank {self._rank} lost its connection to another rank at {self.position}; what that rank said, or "
                f"the signal that ended it, is the cause. The last checkpoint is {saved}"
            ) from error

    def at(self, step: int, operation: str) -> None:
        """Note that the loop has come to an operation."""
        self.position = Position(self.position.number + 1, step, operation)
        self._moved = time.monotonic()

    def alive(self) -> None:
        """Note progress within an operation; from any thread."""
        self._moved = time.monotonic()

    def _report_file(self, rank: int) -> Path:
        return self._run.logs / f"rank-{rank:05d}.hang.json"

    def _watch(self) -> None:
        while not self._ended.wait(min(5.0, self._limit_s / 4)):
            if time.monotonic() - self._moved > self._limit_s:
                self._end()

    def _end(self) -> None:
        log.error("no progress for %.0f s at %s", self._limit_s, self.position)
        try:
            mine = self._report_file(self._rank)
            mine.write_text(json.dumps(asdict(self.position)))
            self._leave_traces()
            # The others moved last at about the same time: their reports come within a poll of this one.
            if self._ended.wait(min(30.0, self._limit_s / 2) + 1):
                return
            found = {rank: self._read(rank) for rank in range(self._world_size)} | {self._rank: self.position}
            message = diagnosis(found, self._limit_s)
            log.error("%s", message)
            if self._rank == min(rank for rank, position in found.items() if position):
                self._run.record_event("hang", self.position.step, message)
                print(f"error: {message}", file=sys.stderr, flush=True)
        except Exception:  # a full disk, say: that must not keep a stuck process alive
            log.exception("the hang could not be told in full")
            print(f"error: no progress for {self._limit_s:.0f} s at {self.position}", file=sys.stderr, flush=True)
        # Nothing that waits, exit handlers least of all: the process is stuck.
        os._exit(GO_ON_LATER)

    def _read(self, rank: int) -> Position | None:
        try:
            return Position(**json.loads(self._report_file(rank).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def _leave_traces(self) -> None:
        """Every thread's stack, and on NCCL the collectives that this rank remembers, for `torchfrtrace`."""
        with self._report_file(self._rank).with_suffix(".stacks").open("w") as file:
            faulthandler.dump_traceback(file)
        if dist.is_initialized() and dist.get_backend() == "nccl":
            trace = torch._C._distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]
            (self._run.logs / f"collectives-{self._rank}").write_bytes(trace)


def diagnosis(found: Mapping[int, Position | None], limit_s: float) -> str:
    """Which ranks hang, by what every rank reported of itself; None: nothing."""
    silent = [rank for rank, position in found.items() if position is None]
    positions = {rank: position for rank, position in found.items() if position}
    behind = min(position.number for position in positions.values())
    last = [rank for rank, position in positions.items() if position.number == behind]
    waiting = [rank for rank in positions if rank not in last]
    text = f"no progress for {limit_s:.0f} s: "
    if silent:
        text += f"{_ranks(silent)} gave no sign (stopped, or its machine is gone); the others wait: "
    elif waiting:
        text += f"{_ranks(last)} hangs at {positions[last[0]]}; the others wait: "
    else:
        return text + f"all ranks are at {positions[last[0]]}; logs/*.hang.stacks says where in it each one is"
    others = [rank for rank in positions if silent or rank in waiting]
    places = sorted({(positions[rank].number, str(positions[rank])) for rank in others})
    at = {number: [rank for rank in others if positions[rank].number == number] for number, _ in places}
    return text + "; ".join(f"{_ranks(at[number])} at {place}" for number, place in places)


def _ranks(ranks: list[int]) -> str:
    """`rank 3`, or `ranks 0, 1, 2, ...`: at most eight are named."""
    names = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {names}" if len(ranks) == 1 else f"ranks {names}"
