"""The frame of one rank: it ends with its launcher, and errors become one line on the terminal and an exit status."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable

import torch.distributed as dist

from ...data.format.damage import DamagedDataError
from ...data.processes import end_with_parent
from ...parallel.failures import PeerError, full_memory, gpu_error, is_lost_peer, local_nccl_error
from ...parallel.world import World
from ..errors import GO_ON_LATER, GPU_ERROR, IO_ERROR, USER_ERROR, CommonError, print_error

log = logging.getLogger(__name__)

LAUNCHER = "LONGRING_LAUNCHER"
"""Environment variable in which `longring` tells its ranks its process id."""


def as_rank(function: Callable[[], int | None]) -> int:
    """Call `function` as a rank of a process group; return its exit status, or that of an error, printed in one line.

    Every rank makes the same checks and fails identically, so only local rank 0 of each node prints an error. An error
    of one rank is printed by that rank: damaged data, a file that could not be read or written, full memory, a report
    of its GPU or NCCL, or a rank that it cannot reach. Tracebacks go to the logs.
    """
    try:
        world = World.from_environment()
    except ValueError as error:  # of this rank alone, so far as it can know
        print_error(str(error))
        return USER_ERROR
    # A rank whose launcher is killed stops as after any SIGTERM: all ranks save first, if they can. Ranks that are
    # started by hand may outlive the shell.
    if launcher := os.environ.get(LAUNCHER):
        end_with_parent(int(launcher), signal.SIGTERM)  # its id, since it may have ended before this line
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid(), signal.SIGTERM)
    try:
        status = function() or 0
    except KeyboardInterrupt:  # Ctrl-C at the launcher, which passes it on
        return 128 + signal.SIGINT
    except Exception as error:
        log.exception("stopped")
        if (ending := _ending(error, world.rank)) is None:
            raise
        status, message, everywhere = ending
        if not everywhere or world.local_rank == 0:
            print_error(message)
        # The process group is not left: other ranks may be inside a collective, and leaving could wait for them.
        return status
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


def _ending(error: Exception, number: int) -> tuple[int, str, bool] | None:
    """Return the exit status and the line of an error, and whether all ranks meet it; None: it is LongRing's own."""
    # Causes on this rank come first, since torch raises RuntimeErrors for them, as it does for a lost rank; and
    # ConnectionError comes before OSError, of which it is one.
    rank, text = f"rank {number}", str(error) or type(error).__name__
    if (full := full_memory(error)) is not None:
        message = (
            f"{rank}: not enough {full}; lower parallel.tokens_per_rank, or raise parallel.zero_stage or "
            "parallel.tensor, and the same command continues"
        )
        return USER_ERROR, message, False
    if (reason := gpu_error(error)) is not None:
        message = (
            f"{rank}: its GPU reports: {reason}; give the same command again, and exclude the machine if it happens "
            "there again"
        )
        return GPU_ERROR, message, False
    if (reason := local_nccl_error(error)) is not None:
        # No start succeeds with, for example, two ranks on one GPU; a full /dev/shm may be another's, and pass.
        status = USER_ERROR if "invalid" in text.splitlines()[0] else IO_ERROR
        return status, f"{rank}: NCCL fails on this rank: {reason}; mend this and give the same command again", False
    if isinstance(error, PeerError):
        return GO_ON_LATER, text, False
    # While the ranks join, or outside of training, where no watchdog makes it a ConnectionError.
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and is_lost_peer(error)):
        reason = text.splitlines()[0]
        return GO_ON_LATER, f"{rank}: cannot reach the other ranks: {reason}; give the same command again", False
    if isinstance(error, ConnectionError):
        return GO_ON_LATER, text, True
    if isinstance(error, OSError):
        return IO_ERROR, text, isinstance(error, CommonError)
    if isinstance(error, ValueError | ArithmeticError):
        return USER_ERROR, text, not isinstance(error, DamagedDataError)
    return None
