"""A watchdog that names the rank, the step and the operation that hang, and ends the run.

A thread of each rank watches its position. After too long without progress it writes a report to the run directory,
waits for the reports of the other ranks, compares them and ends the process; progress meanwhile withdraws the report. A
rank without a report is stopped or gone, and is named. A stop counts for the ranks that wait, and not for the stopped
one, which does not poll.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist

from ...parallel.failures import is_lost_peer
from ..checkpoint.format import complete_checkpoints
from ..errors import rank_names
from ..run_directory import RunDirectory
from .clock import Clock, Position

log = logging.getLogger(__name__)

BLOCKED_S = 60.0
"""Time after which a process ends whose own report, or comparison of reports, blocks."""
TELL_S = 3.0
"""Time that the rank that reports a hang has before the other ranks end, and their connections with them."""


class Watchdog(Clock):
    """A clock of all ranks of a run, which report to its directory; 0 seconds never end this process."""

    def __init__(self, run: RunDirectory, rank: int, world_size: int, limit_s: float) -> None:
        super().__init__(rank, limit_s)
        self._run = run
        self._world_size = world_size
        # The other ranks stopped moving at about the same time, so their reports follow within one poll.
        self._reports_s = min(30.0, limit_s / 2) + 1
        self._reported = False

    def __enter__(self) -> Self:
        if self._limit_s:
            self._report_file(self._rank).unlink(missing_ok=True)  # of an earlier start
        return super().__enter__()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Raise ConnectionError with the position of this rank if a collective failed because another rank is gone."""
        super().__exit__(kind, error, trace)
        if self._reported:
            faulthandler.cancel_dump_traceback_later()
        if isinstance(error, RuntimeError) and is_lost_peer(error):
            raise ConnectionError(
                f"rank {self._rank}: lost its connection to another rank at {self.position}; the cause is the error of "
                f"that rank, or the signal that ended it. The last checkpoint is {self._last_saved()}"
            ) from error

    def _last_saved(self) -> str:
        try:
            return next((path.name for path in complete_checkpoints(self._run.checkpoints)), "none yet")
        except OSError as error:
            return f"unknown, since {self._run.checkpoints} cannot be listed ({error.strerror})"

    def _report_file(self, rank: int) -> Path:
        return self._run.logs / f"rank-{rank:05d}.hang.json"

    def _moved(self, idle_s: float) -> None:
        """Withdraw the report of a hang."""
        if self._reported:
            log.warning("progress again after %.0f s at %s", idle_s, self.position)
            faulthandler.cancel_dump_traceback_later()
            self._report_file(self._rank).unlink(missing_ok=True)
            self._reported = False

    def _idle(self, idle_s: float) -> None:
        """Report a hang, and end this process once the reports of the other ranks are there."""
        if idle_s > self._limit_s and not self._reported:
            self._reported = True
            self._report()
        elif idle_s > self._limit_s + self._reports_s:
            self._end()

    def _report(self) -> None:
        """Write the position of this rank and its traces, for the other ranks and for people."""
        # NCCL or a file system may block this thread too, even with Python's lock held: a thread of C, which needs no
        # lock, then prints the stacks and ends the process with status 1.
        faulthandler.dump_traceback_later(self._reports_s + BLOCKED_S, exit=True)
        log.error("no progress for %.0f s at %s", self._limit_s, self.position)
        try:
            self._report_file(self._rank).write_text(json.dumps(asdict(self.position)))  # no fsync: it may never return
            self._leave_traces()
        except Exception:  # a full disk, for example, must not keep a stuck process alive
            log.exception("the hang could not be reported in full")

    def _end(self) -> None:
        """Compare the reports of all ranks, say which of them hang, and end this process."""
        try:
            found = {rank: self._read_report(rank) for rank in range(self._world_size)} | {self._rank: self.position}
            message = diagnosis(found, self._limit_s)
            log.error("%s", message)
            # The first rank that can report does so for all.
            if self._rank == min(rank for rank, position in found.items() if position):
                self._run.record_event("hang", self.position.step, message)
                print(f"error: {message}", file=sys.stderr, flush=True)
            else:
                time.sleep(TELL_S)
        except Exception:
            log.exception("the reports could not be compared")
            print(f"error: no progress for {self._limit_s:.0f} s at {self.position}", file=sys.stderr, flush=True)
        self._exit()

    def _read_report(self, rank: int) -> Position | None:
        try:
            return Position(**json.loads(self._report_file(rank).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def _leave_traces(self) -> None:
        """Write the stack of every thread, and with NCCL the last collectives of this rank, for `torchfrtrace`."""
        with self._report_file(self._rank).with_suffix(".stacks").open("w") as file:
            faulthandler.dump_traceback(file)
        if dist.is_initialized() and dist.get_backend() == "nccl":
            trace = torch._C._distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]
            (self._run.logs / f"collectives-{self._rank}").write_bytes(trace)


def diagnosis(found: Mapping[int, Position | None], limit_s: float) -> str:
    """Return a sentence that names the hanging ranks, from the reported position of every rank (None: no report)."""
    silent = [rank for rank, position in found.items() if position is None]
    positions = {rank: position for rank, position in found.items() if position}
    behind = min(position.number for position in positions.values())  # fewest positions passed
    last = [rank for rank, position in positions.items() if position.number == behind]
    waiting = [rank for rank in positions if rank not in last]
    text = f"no progress for {limit_s:.0f} s: "
    if silent:
        text += f"{rank_names(silent)} left no report (stopped, or its node is gone); the others wait: "
    elif waiting:
        text += f"{rank_names(last)} hangs at {positions[last[0]]}; the others wait: "
    else:
        return text + f"all ranks are at {positions[last[0]]}; logs/*.hang.stacks has the stacks of each"
    others = [rank for rank in positions if silent or rank in waiting]  # beside silent ranks, all that report wait
    distinct = sorted({(positions[rank].number, str(positions[rank])) for rank in others})
    # number → ranks; those furthest behind come first
    at = {number: [rank for rank in others if positions[rank].number == number] for number, _ in distinct}
    return text + "; ".join(f"{rank_names(at[number])} at {position}" for number, position in distinct)
