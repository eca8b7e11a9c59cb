"""Processes that end with the process that started them, also when that one is killed."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
"""Option of prctl(2), from <linux/prctl.h>."""


def end_with_parent(parent: int, stop: signal.Signals = signal.SIGKILL) -> None:
    """Have Linux send `stop` to this process when the process `parent` that forked it ends, for any reason.

    A process calls it for itself, as early as it can: a parent that has ended before is noticed, and `stop` is sent at
    once. `parent` is the id that the parent has told its child; `os.getppid()` if it has not, which misses an earlier
    end. Linux sends the signal when the forking *thread* ends, so that thread must live as long as the parent.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(stop), 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), stop)
