"""A simulated death of the process, as an exception."""

from __future__ import annotations

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
