"""LongRing's modules from this checkout, whether or not it is installed: a GPU machine needs torch and triton alone."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def load(module: str) -> Any:
    """The module `longring.<module>`, for example `kernels.attention`."""
    if "longring" not in sys.modules:
        # The top-level folders of the checkout are the packages of `longring`, as pyproject.toml maps them.
        package = types.ModuleType("longring")
        package.__path__ = [str(ROOT)]
        sys.modules["longring"] = package
    return importlib.import_module(f"longring.{module}")
