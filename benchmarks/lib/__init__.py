"""Parts that several benchmarks share. Importing it makes `longring` importable from this checkout.

A GPU machine then needs torch and triton alone, and no install.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if "longring" not in sys.modules:
    # The top-level folders of the checkout are the packages of `longring`, as pyproject.toml maps them.
    package = types.ModuleType("longring")
    package.__path__ = [str(ROOT)]
    sys.modules["longring"] = package
