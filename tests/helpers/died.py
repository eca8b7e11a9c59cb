"""The death of a process: a simulated one, as an exception, and a real one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


class Died(BaseException):
    """The simulated end of a process. It is not an Exception, so that only `except BaseException` catches it."""


def die_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    """Raise `Died` at every rename and removal of a directory after the first `steps` of them."""
    left = steps

    def counted(function: Callable) -> Callable:
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise Died
            return function(*arguments, **options)

        return call

    patch.setattr(Path, "rename", counted(Path.rename))
    patch.setattr(shutil, "rmtree", counted(shutil.rmtree))


def end_process(status: int, *_: object) -> None:
    """End this process at once with an exit status, whatever the other arguments are."""
    os._exit(status)
