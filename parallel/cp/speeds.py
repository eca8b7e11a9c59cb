"""The speed of attention by device and backend: that of a record of `benchmarks/gpu_check.py`, else assumed.

`speeds.json` has the records' speeds; `python benchmarks/tables` writes it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

from ...kernels.backends import Selection
from .cost import ASSUMED, Speed

FILE = Path(__file__).with_name("speeds.json")
ASSUMED_BY_BACKEND = {"triton": Speed(forward_flops=400e12, backward_flops=230e12, tile_s=10e-6)}
"""Assumed speeds of an H100 of backends that are slower than the fastest: estimates from their machine code
(docs/kernels.md), not measured."""


def speed_of(device: str, backend: str = "auto") -> tuple[Speed, str]:
    """Return the speed of an attention backend ("auto": the fastest) on a device as torch names it, and its origin.

    Of the text of a `Selection` the backends of whole tiles count: most tiles of context parallelism are whole. The
    origin is the path of a record, or "assumed": then the speed is that of an H100 in bf16, whatever the device.
    """
    selection, known = Selection.parse(backend), measured_speeds().get(device, {})
    names = [selection.name_of(task, "whole") for task in ("continued", "backward")]
    forward, backward = (
        Speed(**known[name]["speed"]) if name in known else ASSUMED_BY_BACKEND.get(name, ASSUMED) for name in names
    )
    origin = known[names[0]]["record"] if set(names) <= known.keys() else "assumed"
    return replace(forward, backward_flops=backward.backward_flops), origin


@cache
def measured_speeds() -> dict[str, dict[str, dict]]:
    """Return `speeds.json`: device -> backend -> its `speed`, the fields of `Speed`, and its `record`."""
    return json.loads(FILE.read_text())
