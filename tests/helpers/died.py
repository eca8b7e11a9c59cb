"""A process that ends in the middle of its work, without leaving this one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


class Died(BaseException):
    """Stands for the end of a process; nothing catches it but the clean-up that a real end would not run."""


def die_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    """Raise `Died` after so many of the steps that others see, renames and removals, and at every one from then on."""
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
