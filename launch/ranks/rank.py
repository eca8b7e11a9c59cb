"""The frame of one rank: it ends with its launcher, and errors become one line on the terminal and an exit status."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable

import torch
import torch.distributed as dist

from ...data.processes import end_with_parent
from ...parallel.cp.group import PeerError
from ...parallel.world import World
from ..errors import GO_ON_LATER, IO_ERROR, USER_ERROR, CommonError, print_error

log = logging.getLogger(__name__)

LAUNCHER = "LONGRING_LAUNCHER"
"""Environment variable in which `longring` tells its ranks its process id."""


def is_lost_peer(error: RuntimeError) -> bool:
    """Return whether a collective failed because another rank is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)


def as_rank(function: Callable[[], int | None]) -> int:
    """Call `function` as a rank of a process group; return its exit status, or that of an error, printed in one line.

    Every rank makes the same checks and fails identically, so only local rank 0 of each node prints an error. A file
    that could not be read or written is an error of one rank, which prints it itself. Tracebacks go to the logs.
    """
    try:
        world = World.from_environment()
    except ValueError as error:  # of this rank alone, so far as it can know
        print_error(str(error))
        return USER_ERROR
    # A rank whose launcher is killed stops as after any SIGTERM: all ranks save first, if they can. Ranks that are
    # started by hand may outlive the shell.
    if launcher := os.environ.get(LAUNCHER):
        end_with_parent(int(launcher), signal.SIGTERM)
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid(), signal.SIGTERM)
    try:
        status = function() or 0
    except (ValueError, OSError, ArithmeticError) as error:
        log.exception("stopped")
        own = isinstance(error, OSError) and not isinstance(error, ConnectionError | CommonError)
        if own or world.local_rank == 0:
            print_error(str(error))
        # The process group is not left: other ranks may be inside a collective, and leaving could wait for them.
        if isinstance(error, ConnectionError):
            return GO_ON_LATER
        return IO_ERROR if isinstance(error, OSError) else USER_ERROR
    except dist.DistError as error:  # while the ranks join; later the watchdog makes it a ConnectionError
        log.exception("stopped")
        reason = str(error).splitlines()[0]
        print_error(f"rank {world.rank}: cannot reach the other ranks: {reason}; give the same command again")
        return GO_ON_LATER
    except PeerError as error:
        log.exception("stopped")
        print_error(str(error))
        return GO_ON_LATER
    except torch.OutOfMemoryError as error:
        log.exception("stopped")
        print_error(
            f"rank {world.rank}: not enough GPU memory: {error}; lower parallel.tokens_per_rank, or raise "
            "parallel.zero_stage or parallel.tensor, and the same command continues"
        )
        return USER_ERROR
    if dist.is_initialized():
        dist.destroy_process_group()
    return status
