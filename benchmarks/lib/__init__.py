"""Parts that several benchmarks share. Importing it makes `longring` importable from this checkout.

A GPU machine then needs torch and triton alone, and no install.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if "longring" not in sys.modules:
    spec = importlib.util.spec_from_file_location("longring", ROOT / "longring" / "__init__.py")
    assert spec is not None and spec.loader is not None
    sys.modules["longring"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
