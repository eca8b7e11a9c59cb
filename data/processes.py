"""Processes that end with the process that started them, also when that one is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process

_PR_SET_PDEATHSIG = 1
"""Option of prctl(2), from <linux/prctl.h>."""


def end_with_parent(parent: int, stop: signal.Signals = signal.SIGKILL) -> None:
    """Have Linux send `stop` to this process when the process `parent` that forked it ends, for any reason.

    A process calls it for itself, as early as it can: a parent that has ended before is noticed, and `stop` is sent at
    once. `parent` is the id that the parent has told its child; `os.getppid()` if it has not, which misses an earlier
    end. Linux sends the signal when the forking *thread* ends, so that thread must live as long as the parent.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(stop), 0, 0, 0)
    # After the call above: a parent that ended before it is not there, and one that ends now sends the signal.
    if os.getppid() != parent:
        os.kill(os.getpid(), stop)


@contextmanager
def process_pool(
    count: int, begin: Callable[..., object] | None = None, *arguments: object
) -> Iterator[ProcessPoolExecutor]:
    """Give a pool of `count` processes that end with this one; each calls `begin(*arguments)` first, if given.

    An exception in the context ends them at once. Otherwise the tasks at work are done first, and those that wait are
    cancelled: the context itself has to wait for the results that it needs.
    """
    # Not by fork: a copy of this process could hold locks of threads that it does not have.
    pool = ProcessPoolExecutor(count, get_context("forkserver"), initializer=_begin, initargs=(begin, *arguments))
    try:
        yield pool
    except BaseException:
        # Until Python 3.14 a pool has no method for this; `shutdown` waits for the tasks at work.
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(begin: Callable[..., object] | None, *arguments: object) -> None:
    """Begin a process of a pool: a thread waits for the end of the process that uses the pool, and then ends this one.

    The parent that Linux knows is the fork server, which lives as long as its children do.
    """
    user = parent_process()
    assert user is not None, "a pool's processes are children of the process that uses it"

    def end_with_user() -> None:
        user.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end_with_user, name="end with user", daemon=True).start()
    if begin is not None:
        begin(*arguments)
