"""The speeds of attention in `parallel/cp/speeds.json`, from records of gpu_check.py with its section `backends`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .table import ROOT

FILE = ROOT / "parallel" / "cp" / "speeds.json"
DIRECTIONS = {"forward": ("forward", "continued"), "backward": ("backward",)}


def speeds_text(directory: Path = ROOT / "benchmarks" / "results") -> str:
    """Return the content of speeds.json; of several records of a device the last by name counts."""
    found: dict[str, Any] = {}
    for file in sorted(directory.glob("*.json")):
        record = json.loads(file.read_text())
        if isinstance(record, dict) and not record.get("device", "CPU").startswith("CPU") and record.get("backends"):
            name = f"benchmarks/results/{file.name}"
            found[record["device"]] = {
                backend: {"speed": speed, "record": name} for backend, speed in speeds(record["backends"]).items()
            }
    return json.dumps(found, indent=1) + "\n"


def speeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the fields of `Speed` by backend, and of "auto", the fastest in each direction, for causal tiles.

    FLOP/s are those of the longest tile; the fixed time of a tile is what the shortest takes beyond them, forward.
    """
    causal = [row for row in rows if row.get("tflops") and row["mask"] == "causal"]
    found: dict[str, dict[str, float]] = {}
    for backend in dict.fromkeys(row["backend"] for row in causal):
        speed = {}
        for direction, tasks in DIRECTIONS.items():
            of_tasks = [row for row in causal if row["backend"] == backend and row["task"] in tasks]
            if of_tasks:
                speed[f"{direction}_flops"] = 1e12 * max(of_tasks, key=lambda row: row["tokens"])["tflops"]
                if direction == "forward":
                    short = min(of_tasks, key=lambda row: row["tokens"])
                    at_rate_ms = short["ms"] * short["tflops"] * 1e12 / speed["forward_flops"]
                    speed["tile_s"] = max(0.0, round(1e-3 * (short["ms"] - at_rate_ms), 7))
        if len(speed) == 3:
            found[backend] = speed
    if found:
        names = ("forward_flops", "backward_flops")
        tile_s = min(speed["tile_s"] for speed in found.values())
        found["auto"] = {name: max(speed[name] for speed in found.values()) for name in names} | {"tile_s": tile_s}
    return found
