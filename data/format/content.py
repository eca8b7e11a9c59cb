"""The content of manifest.json and inputs.jsonl as it is read: every field has its type and is within bounds."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import read_patiently
from .ledger import Ledger
from .names import MAX_BYTES, is_name, is_sha256
from .settings import with_defaults

MAX_LENGTH = 1 << 40
_DIRECTORY = re.compile(r"[^/\0-\x1f]{1,255}")
MAX_VOCABULARY = 1 << 28


def read_json(file: Path, name: str) -> Any:
    """Return the value of a JSON file.

    Raises ValueError if it is larger than `name` may be, too deep or not JSON, and OSError if it cannot be read.
    """

    def read() -> str:
        if (size := file.stat().st_size) > MAX_BYTES[name]:
            raise ValueError(f"{size} bytes, and it has at most {MAX_BYTES[name]}")
        return file.read_text(encoding="utf-8")

    try:
        return json.loads(read_patiently(file, read))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def checked_content(content: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `Manifest` from the JSON value of a manifest without its hash; versions 2 and 3 are read.

    Raises ValueError, TypeError, KeyError or AttributeError for a field that is missing, of another type or out of
    bounds.
    """
    if content["format_version"] == 2:
        joined = ", ".join(content["sources"])
        kept = {name: value for name, value in content.items() if name != "ledger"}
        content = {**kept, "format_version": 3, "extends": None, "ledgers": {joined: content["ledger"]}}
    for name, is_right in _FIELDS.items():
        if not is_right(content[name]):
            raise ValueError(f"{name} = {content[name]!r:.80}")
    if unknown := sorted(content.keys() - _FIELDS.keys()):
        raise ValueError(f"it has an unknown field {unknown[0]!r:.80}")
    if not 0 <= content["boundary_id"] < content["vocab_size"]:
        raise ValueError(f"boundary_id = {content['boundary_id']} of {content['vocab_size']} tokens")
    for name in content["files"]:
        if not is_name(name):
            raise ValueError(f"it names a file {name[:80]!r}, and prepared data has none of this name")
    if content["order"] is not None and not {"order.json", "placement.npy"} <= content["files"].keys():
        raise ValueError("it lacks the files of ordered data")
    ledgers = {name: Ledger.from_json(one) for name, one in content["ledgers"].items()}
    try:
        # `check` asserts for the ledgers that LongRing makes; this one comes from outside.
        for ledger in ledgers.values():
            ledger.check()
    except AssertionError as error:
        raise ValueError("its ledger does not add up") from error
    config = with_defaults(content["config"])
    return {**content, "config": config, "lengths": tuple(content["lengths"]), "ledgers": ledgers}


def read_inputs(file: Path, num_lines: int | None) -> list[dict[str, Any]]:
    """Return the lines of inputs.jsonl.

    Raises ValueError unless each is that of an input shard, and all are there, and OSError if it cannot be read.
    """
    found = []
    for number, line in enumerate(read_patiently(file, file.read_bytes).splitlines(), start=1):
        try:
            entry = json.loads(line)
            if not all(check(entry.get(name)) for name, check in _INPUT_FIELDS.items()):
                raise ValueError("a field has another type or is out of range")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file}: line {number} does not describe an input shard") from error
        found.append(entry)
    if num_lines not in (None, len(found)):
        raise ValueError(f"{file}: has {len(found)} lines for {num_lines} input shards")
    return found


def whole(least: int, most: int) -> Callable[[Any], bool]:
    """Return the check that a value is a whole number from `least` to `most`."""
    return lambda value: type(value) is int and least <= value <= most  # True and False are of type bool


def _are_lengths(value: Any) -> bool:
    is_length = whole(1, MAX_LENGTH)
    return isinstance(value, list) and all(map(is_length, value)) and value == sorted(set(value)) != []


def _are_sources(value: Any) -> bool:
    return isinstance(value, dict) and all(map(whole(0, 1 << 32), value.values())) and sum(value.values()) > 0


def _are_files(value: Any) -> bool:
    needed = {"tokenizer.json", "unigram.npy", "shards.npy", "inputs.jsonl"}
    return isinstance(value, dict) and needed <= value.keys() and all(map(is_sha256, value.values()))


def _has(*names: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(name in value for name in names)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


_INPUT_FIELDS: dict[str, Callable[[Any], bool]] = {
    "source": lambda value: isinstance(value, str),
    "files": _are_texts,
    # Only the two that follow may be missing, as in data of earlier versions.
    "bin": lambda value: value is None or whole(0, 1 << 32)(value),
    "keep_from": lambda value: value is None or type(value) is float,
    **dict.fromkeys(("size_bytes", "part", "parts", "records", "documents", "tokens"), whole(0, 1 << 62)),
}
"""Check of each field of an input shard."""

_FIELDS: dict[str, Callable[[Any], bool]] = {
    "format_version": whole(0, MAX_LENGTH),
    "files": _are_files,
    "vocab_size": whole(1, MAX_VOCABULARY),
    "boundary": lambda value: isinstance(value, str),
    "boundary_id": whole(0, MAX_VOCABULARY),
    "dtype": lambda value: value in ("<u2", "<u4"),
    "config": _has("source", "sources"),
    "lengths": _are_lengths,
    "has_boundaries": lambda value: isinstance(value, bool),
    "sources": _are_sources,
    "order": lambda value: value is None or _has("by", "mode", "position_resets")(value),
    "extends": lambda value: value is None or (isinstance(value, str) and _DIRECTORY.fullmatch(value) is not None),
    "ledgers": lambda value: isinstance(value, dict) and len(value) > 0,
}
"""Check of each field."""
