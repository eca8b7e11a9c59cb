"""Start the ranks of one machine, and be one of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from ..parallel.cp.group import PeerError

log = logging.getLogger(__name__)


def local_ranks(configured: int) -> int:
    """Processes to start here: as configured, else one for each GPU, else one."""
    return configured or torch.cuda.device_count() or 1


def start_ranks(module: str, arguments: Sequence[str], count: int) -> int:
    """Run `python -m module arguments` as `count` ranks joined by torchrun -> 0, or the first failed rank's status."""
    # One thread a rank unless told otherwise, as torchrun itself decides, but without its notice.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    # A rank that fails has said why; torchrun's own summary would bury it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(parse_args(["--standalone", "--nproc-per-node", str(count), "--module", module, *arguments]))
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    return 0


def as_rank(work: Callable[[], object]) -> int:
    """Do a rank's work -> its exit status: 0, or 2 after an error of the user's, told in one line.

    Every rank makes the same checks and fails alike, so one on each machine speaks; the rest is in the logs. Only what
    a rank knows of a dead peer is its own, and every rank says it.
    """
    try:
        if "RANK" not in os.environ:
            raise ValueError("no RANK in the environment: start it by torchrun, or use the `longring` command")
        work()
    except (ValueError, OSError, ArithmeticError, PeerError) as error:
        log.exception("stopped")
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, PeerError):
            Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        # Without leaving the process group: other ranks may be inside a collective, and leaving could wait for them.
        return 2
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0
