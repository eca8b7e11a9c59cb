"""The content of a checkpoint's manifest as it is read: every field has its type and is within bounds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ...data.format.content import whole
from ...data.format.names import is_sha256

MAX_BYTES = 1 << 30
"""Largest size of a manifest: about ninety times that of 1,024 ranks with 300 parameters under ZeRO 3."""
_MAX_NUMBER = 1 << 53
_MAX_RANKS = 1 << 24
_RANK_FILE = re.compile(r"rank-[0-9]{5,9}\.safetensors")
_RUN = re.compile(r"[0-9a-f]{32}")


def check_content(content: Mapping[str, Any], step: int | None) -> None:
    """Check the JSON value of a manifest without its format and hash; `step` is that of the directory, if it has one.

    Raises ValueError for a field that is missing, of another type or out of bounds.
    """
    _check_fields("", content, {"state": _is_table, "parameters": _is_table, "files": _is_table})
    state = content["state"]
    _check_fields("state.", state, _STATE)
    if step not in (None, state["step"]):
        raise ValueError(f"state.step = {state['step']}, and its directory is that of step {step}")
    if not _ascend(state["skipped"], state["step"]):
        raise ValueError(f"state.skipped = {state['skipped']!r:.80}")
    numels = {}  # of one tensor-parallel slice, by parameter
    for name, entry in content["parameters"].items():
        _check_fields(f"parameters.{name!r:.80}.", entry, _PARAMETER)
        numels[name] = _slice_numel(name, entry, state["tensor"])
    for name, entry in content["files"].items():
        if not _RANK_FILE.fullmatch(name):
            raise ValueError(f"it names a file {name[:80]!r}, and ranks write rank-NNNNN.safetensors")
        _check_fields(f"files.{name}.", entry, {**_FILE, "slice": whole(0, state["tensor"] - 1)})
        for parameter, found in entry["ranges"].items():
            if not _is_range(found, numels.get(parameter, -1)):  # -1: a parameter without an entry has no range
                raise ValueError(f"files.{name}.ranges.{parameter!r:.80} = {found!r:.80}")


def _check_fields(prefix: str, found: Any, fields: Mapping[str, Callable[[Any], bool]]) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{prefix}* = {found!r:.80}")
    for name, is_right in fields.items():
        if name not in found:
            raise ValueError(f"it has no {prefix}{name}")
        if not is_right(found[name]):
            raise ValueError(f"{prefix}{name} = {found[name]!r:.80}")
    if unknown := sorted(found.keys() - fields.keys()):
        raise ValueError(f"it has an unknown field {prefix}{unknown[0]!r:.80}")


def _slice_numel(name: str, entry: Mapping[str, Any], tensor: int) -> int:
    """Return the number of elements of one slice of a parameter. Raises ValueError if its cut leaves a remainder."""
    shape = entry["shape"]
    numel = math.prod(shape)
    if numel > _MAX_NUMBER:
        raise ValueError(f"parameters.{name!r:.80}.shape = {shape!r:.80}")
    if entry["cut"] is None:
        return numel
    dim, stride = entry["cut"]
    if (shape[0], numel // shape[0])[dim] % (stride * tensor):  # [rows, columns] of the parameter as a matrix
        raise ValueError(f"parameters.{name!r:.80}.cut = {entry['cut']} of shape {shape!r:.80} for {tensor} slices")
    return numel // tensor


def _is_range(value: Any, numel: int) -> bool:
    number = whole(0, numel)
    # [first element, number of elements]
    return isinstance(value, list) and len(value) == 2 and all(map(number, value)) and sum(value) <= numel


def _ascend(steps: list[Any], last: int) -> bool:
    return all(map(whole(1, last), steps)) and steps == sorted(set(steps))


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _are_packages(value: Any) -> bool:
    texts = [*value, *value.values()] if isinstance(value, dict) else [None]
    return all(isinstance(text, str) and text.isprintable() for text in texts)


def _are_losses(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(loss, float) and math.isfinite(loss) for loss in value)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= 8 and all(map(whole(1, _MAX_NUMBER), value))


def _is_cut(value: Any) -> bool:
    if value is None:
        return True
    # [dim, stride]
    return isinstance(value, list) and len(value) == 2 and whole(0, 1)(value[0]) and whole(1, 1 << 10)(value[1])


_STATE: dict[str, Callable[[Any], bool]] = {
    "run": lambda value: isinstance(value, str) and _RUN.fullmatch(value) is not None,
    "recipe": _is_table,
    "data": is_sha256,
    "code": is_sha256,
    "packages": _are_packages,
    "order": whole(1, _MAX_NUMBER),
    "step": whole(0, _MAX_NUMBER),  # 0: imported weights
    "world_size": whole(1, _MAX_RANKS),
    "tensor": whole(1, _MAX_RANKS),
    "zero_stage": whole(0, 3),
    "skipped": lambda value: isinstance(value, list),
    "recent_losses": _are_losses,
}
"""Check of each field of the state."""

_PARAMETER: dict[str, Callable[[Any], bool]] = {"shape": _is_shape, "cut": _is_cut}
"""Check of each field of a parameter."""

_FILE: dict[str, Callable[[Any], bool]] = {"bytes": whole(0, _MAX_NUMBER), "sha256": is_sha256, "ranges": _is_table}
"""Check of each field of a file, except its slice, which depends on the state."""
