"""Let these tests import the scripts of benchmarks/ and their package `lib`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
