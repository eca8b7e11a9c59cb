"""Start the ranks of one machine, and wait for them."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

import psutil
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

from ..errors import GO_ON_LATER
from .rank import print_error
from .signals import STOP_SIGNALS


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
    print_error(
        f"local rank {worst.local_rank} was ended by {name}{why}; the same command goes on from the last checkpoint"
    )
    return 128 - worst.exitcode
