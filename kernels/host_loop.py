"""Loops over NumPy arrays that numba compiles, since NumPy cannot express them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from numba import njit


def host_loop(loop: Callable[..., Any]) -> Callable[..., Any]:
    """Return a loop compiled at its first call, which runs without Python's lock.

    The machine code is kept for other processes beside the source, or in the user's cache. Where neither can be
    written, as in a read-only image without a home, or where the disk is full, each process compiles for itself.
    """
    try:
        compiled = njit(cache=True, nogil=True)(loop)
    except RuntimeError:  # numba found no directory to write to
        return njit(nogil=True)(loop)

    @wraps(loop)
    def run(*arguments: Any) -> Any:
        try:
            return compiled(*arguments)
        except OSError:  # compiled but not kept, and not run: the disk is full
            return compiled(*arguments)

    return run
