"""Be one rank: do its work, and turn its errors into one line and an exit status."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape

from ...parallel.cp.group import PeerError
from ..errors import GO_ON_LATER, IO_ERROR, USER_ERROR, CommonError

log = logging.getLogger(__name__)


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)


def as_rank(work: Callable[[], int | None]) -> int:
    """Do a rank's work -> its exit status: what work says, or that of an error, told in one line.

    Every rank makes the same checks and fails alike, so one on each machine speaks; of a file that it could not read or
    write each rank speaks itself. The rest is in the logs.
    """
    try:
        if "RANK" not in os.environ:
            raise ValueError("no RANK in the environment: start it by torchrun, or use the `longring` command")
        status = work() or 0
    except (ValueError, OSError, ArithmeticError) as error:
        log.exception("stopped")
        alone = isinstance(error, OSError) and not isinstance(error, ConnectionError | CommonError)
        if alone or os.environ.get("LOCAL_RANK", "0") == "0":
            print_error(str(error))
        # Without leaving the process group: other ranks may be inside a collective, and leaving could wait for them.
        if isinstance(error, ConnectionError):
            return GO_ON_LATER
        return IO_ERROR if isinstance(error, OSError) else USER_ERROR
    except dist.DistError as error:  # while the ranks still meet; later the watchdog says where it was
        log.exception("stopped")
        print_error(f"rank {os.environ['RANK']} cannot reach the others: {str(error).splitlines()[0]}")
        return GO_ON_LATER
    except PeerError as error:
        log.exception("stopped")
        print_error(str(error))
        return GO_ON_LATER
    except torch.OutOfMemoryError as error:
        log.exception("stopped")
        print_error(
            f"rank {os.environ['RANK']} has not enough GPU memory: lower parallel.tokens_per_rank, or raise "
            f"parallel.zero_stage or parallel.tensor; the same command then goes on. {error}"
        )
        return USER_ERROR
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


def print_error(error: str) -> None:
    """Print an error line on stderr."""
    Console(stderr=True).print(f"[bold red]error:[/] {escape(error)}", highlight=False, soft_wrap=True)
