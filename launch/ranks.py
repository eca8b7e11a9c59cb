"""Start the ranks of one machine, and be one of them."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

import psutil
import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

from ..parallel.cp.group import PeerError
from .signals import GO_ON_LATER, STOP_SIGNALS

log = logging.getLogger(__name__)

USER_ERROR = 2
"""Exit status of what only a person can put right."""
IO_ERROR = 74
"""Exit status (EX_IOERR) of a file that could not be read or written: the next try may find it better."""


class CommonError(OSError):
    """What all ranks have come to alike: one on each machine tells of it."""


@dataclass(frozen=True)
class Rendezvous:
    """Where the launchers of several nodes meet."""

    endpoint: str
    """host:port, on the first node."""
    job: str
    """Their common name for this start."""
    num_nodes: int
    node: int
    address: str
    """Under which other nodes reach this one."""

    @property
    def torchrun_options(self) -> list[str]:
        """is_host: torchrun would guess by comparing names, which fails where a node has several. local-addr: it would
        tell the others this machine's full name, which /etc/hosts can make "localhost". read_timeout: seconds to wait
        for the first node; a cold network file system can take minutes to give it torch."""
        conf = f"is_host={int(self.node == 0)},read_timeout=600"
        return [
            *("--nnodes", str(self.num_nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", self.endpoint),
            *("--rdzv-id", self.job, "--rdzv-conf", conf, "--local-addr", self.address),
        ]


def local_ranks(configured: int) -> int:
    """Processes to start here: as configured, else one for each GPU, else one."""
    return configured or torch.cuda.device_count() or 1


def start_ranks(module: str, arguments: Sequence[str], count: int, rendezvous: Rendezvous | None = None) -> int:
    """Run `python -m module arguments` as `count` ranks joined by torchrun -> 0, or the failed ranks' status.

    A stop signal is handed on to the ranks, which save and leave with GO_ON_LATER.
    """
    # One thread a rank unless told otherwise, as torchrun itself decides, but without its notice.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    # A rank that fails has said why; torchrun's own summary would bury it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    stopped = False

    def hand_on(number: int, _: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        for child in psutil.Process().children():
            child.send_signal(signal.SIGUSR1)

    before = {number: signal.signal(number, hand_on) for number in STOP_SIGNALS}
    where = rendezvous.torchrun_options if rendezvous else ["--standalone"]
    # torchrun itself would end the ranks on SIGTERM, within 30 s.
    options = ["--nproc-per-node", str(count), "--max-restarts", "0", "--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT"]
    try:
        run(parse_args([*where, *options, "--module", module, *arguments]))
    except ChildFailedError as error:
        return _status_of(list(error.failures.values()), stopped)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _status_of(failures: Sequence[ProcessFailure], stopped: bool) -> int:
    """The status that says most: a signal's, then an error's; a rank that lost the others comes last.

    SIGTERM is what torchrun ends the others with when one has failed.
    """
    own = [failure for failure in failures if failure.exitcode != -signal.SIGTERM] or failures
    worst = min(own, key=lambda failure: failure.exitcode)
    if worst.exitcode >= 0:
        return worst.exitcode
    if stopped:
        return GO_ON_LATER  # the signal came before the ranks could hear it, or they had no time left
    name = signal.Signals(-worst.exitcode).name
    why = " (out of memory, or by hand)" if name == "SIGKILL" else ""
    _say(f"local rank {worst.local_rank} was ended by {name}{why}; the same command goes on from the last checkpoint")
    return 128 - worst.exitcode


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
            _say(str(error))
        # Without leaving the process group: other ranks may be inside a collective, and leaving could wait for them.
        if isinstance(error, ConnectionError):
            return GO_ON_LATER
        return IO_ERROR if isinstance(error, OSError) else USER_ERROR
    except dist.DistError as error:  # while the ranks still meet; later the watchdog says where it was
        log.exception("stopped")
        _say(f"rank {os.environ['RANK']} cannot reach the others: {str(error).splitlines()[0]}")
        return GO_ON_LATER
    except PeerError as error:
        log.exception("stopped")
        _say(str(error))
        return GO_ON_LATER
    except torch.OutOfMemoryError as error:
        log.exception("stopped")
        _say(
            f"rank {os.environ['RANK']} has not enough GPU memory: lower parallel.tokens_per_rank, or raise "
            f"parallel.zero_stage or parallel.tensor; the same command then goes on. {error}"
        )
        return USER_ERROR
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


def _say(error: str) -> None:
    Console(stderr=True).print(f"[bold red]error:[/] {escape(error)}", highlight=False, soft_wrap=True)
