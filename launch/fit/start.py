"""The plan of a start, kept in its record beside what will be measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import Recipe
from .device import SHEETS, named_device
from .links import assumed_topology, links_of, preset_of
from .memory import moments, peak
from .time import time_of


def predicted(
    recipe: Recipe, world_size: int, vocab_size: int, device_name: str | None, lengths: Sequence[int]
) -> dict[int, dict[str, Any]]:
    """Return the predicted memory of a rank and, on a device with a data sheet, the time of a step, by bucket.

    Both are without what attention sends and holds: pricing grids takes seconds. `device_name` is that of the GPU; None
    on CPUs.
    """
    found: dict[int, dict[str, Any]] = {}
    short = next((short for short, sheet in SHEETS.items() if sheet.name == device_name), None)
    on_gpu = device_name is not None
    for length in lengths:
        memory = peak(moments(recipe, world_size, length, vocab_size, on_gpu=on_gpu))
        kinds = {**memory.by_kind(), "host": memory.host}
        seconds = None
        if short is not None and recipe.train.dtype == "bfloat16":  # the FLOP/s of data sheets are those of bfloat16
            name, _ = preset_of(recipe, world_size)
            links = links_of(recipe, world_size, assumed_topology(name, world_size, short))
            device = named_device(short, recipe.train.attention_backend)
            seconds = time_of(recipe, world_size, length, vocab_size, device, links).total
        found[length] = {"memory_bytes": memory.total, "kinds_bytes": kinds, "step_s": seconds}
    return found
