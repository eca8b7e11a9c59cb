"""Starting the ranks of one node with torchrun, and waiting for them."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Sequence
from types import FrameType

import psutil
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import parse_args, run

from ...parallel.config import GPU_QUEUES
from ...parallel.meet import FREE_PORT, reach
from ..errors import GO_ON_LATER, USER_ERROR, print_error
from .nodes import FIRST_NODE, Rendezvous
from .rank import LAUNCHER
from .signals import STOP_SIGNALS

LOCALHOST = "see that it is this machine: /etc/hosts has a line 127.0.0.1 localhost"
"""Advice of the errors of a start on one node, whose ranks meet at localhost."""


def local_ranks(configured: int) -> int:
    """Return the number of ranks to start on this node: `configured`, or one for each GPU, or one without GPUs."""
    return configured or torch.cuda.device_count() or 1


def start_ranks(
    module: str,
    arguments: Sequence[str],
    count: int,
    rendezvous: Rendezvous | None = None,
    *,
    gpu_queues: int = GPU_QUEUES,
) -> int:
    """Run `python -m module arguments` as `count` ranks under torchrun; return 0 or the exit status of a failed rank.

    Each GPU has `gpu_queues` queues, unless the environment says otherwise. A stop signal is forwarded to the ranks,
    which save and exit with GO_ON_LATER. Ctrl-C ends them at once, and the status is then 130.
    """
    if rendezvous is None and (reason := _unknown_localhost()):
        print_error(f"localhost: {reason}; {LOCALHOST}")
        return USER_ERROR
    # torchrun would set one thread for each rank, and print a notice about it.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    # CUDA reads it when it starts, in a rank's first import that looks for a GPU.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", str(gpu_queues))
    # A rank that fails has printed its error; the summary of torchrun would bury it.
    for name in ("", ".agent.server.api"):  # the second has a level of its own
        logging.getLogger(f"torch.distributed.elastic{name}").setLevel(logging.CRITICAL)
    stopped = False

    def forward(number: int, _: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        for child in psutil.Process().children():
            child.send_signal(signal.SIGUSR1)

    os.environ[LAUNCHER] = str(os.getpid())
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # ranks report a lost store in one line
    before = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    meeting = rendezvous.torchrun_options if rendezvous else ["--standalone"]
    # SIGTERM is not torchrun's to handle: it would end the ranks within 30 s.
    options = ["--nproc-per-node", str(count), "--max-restarts", "0", "--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT"]
    try:
        if rendezvous and rendezvous.node:  # the first node's launcher listens itself
            _await_first_node(rendezvous.endpoint)
        run(parse_args([*meeting, *options, "--module", module, *arguments]))
    except ChildFailedError as error:
        return _status_of(list(error.failures.values()), stopped)
    except SignalException as error:  # torchrun has ended the ranks by the same signal
        return 128 + error.sigval
    except ConnectionError as error:
        print_error(str(error))
        return GO_ON_LATER
    except RendezvousError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        if rendezvous is None:
            print_error(f"localhost: {reason}; {LOCALHOST}")
            return USER_ERROR
        print_error(f"--rendezvous {rendezvous.endpoint}: {reason}; {FREE_PORT}")
        return GO_ON_LATER
    finally:
        del os.environ[LAUNCHER]
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _unknown_localhost() -> str | None:
    """Return the reason why nothing resolves localhost, or None; torchrun would try for minutes."""
    try:
        socket.getaddrinfo("localhost", None)
    except socket.gaierror as error:
        return str(error)
    return None


def _await_first_node(endpoint: str) -> None:
    """Wait until the first node listens at `endpoint`. Raises ConnectionError within seconds if something else does."""
    host, _, port = endpoint.rpartition(":")
    reach(f"--rendezvous {endpoint}", host.strip("[]"), int(port), FIRST_NODE)


def _status_of(failures: Sequence[ProcessFailure], stopped: bool) -> int:
    """Return the status closest to the cause: that of a signal, then of an error, then of a lost connection.

    torchrun ends the remaining ranks with SIGTERM once one has failed, and torch's thread of NCCL may end a rank by
    SIGABRT once another is gone: these two count only if there is nothing else.
    """
    consequences = {-signal.SIGABRT: 1, -signal.SIGTERM: 2}
    # The exit code of a signal is negative, so it comes before those of errors, of which GO_ON_LATER is the highest.
    worst = min(failures, key=lambda failure: (consequences.get(failure.exitcode, 0), failure.exitcode))
    if worst.exitcode >= 0:
        return worst.exitcode
    if stopped:
        return GO_ON_LATER  # the ranks got the signal before they could handle it, or ran out of time
    name = signal.Signals(-worst.exitcode).name
    why = " (out of memory, or sent by hand)" if name == "SIGKILL" else ""
    print_error(
        f"local rank {worst.local_rank}: ended by {name}{why}; the same command continues from the last checkpoint"
    )
    return 128 - worst.exitcode  # 128 + the number of the signal, as in a shell
