"""The names of the files of prepared data, and their largest sizes: here alone a name from outside becomes a path."""

import os
import re
from pathlib import Path

MAX_BYTES = {
    "manifest.json": 1 << 26,
    "tokenizer.json": 1 << 28,
    "unigram.npy": 1 << 31,
    "shards.npy": 1 << 34,
    "inputs.jsonl": 1 << 34,
    "order.json": 1 << 26,
    "placement.npy": 1 << 37,
}
"""Largest size in bytes of each file beside the shards. It is far above what the format can need at 10^13 tokens, and
keeps a data server from filling a disk."""

_SHARD = re.compile(r"shards/[0-9]{6,10}/(?:train|held_out)-L[0-9]{7,13}-[0-9]{6,10}\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_sha256(value: object) -> bool:
    """Return whether a value is a SHA-256 in hexadecimal."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def is_name(name: str) -> bool:
    """Return whether prepared data has files of this name."""
    return name in MAX_BYTES or _SHARD.fullmatch(name) is not None


def path_of(directory: Path, name: str, sha256: str | None = None) -> Path:
    """Return the path of file `name` of prepared data in `directory`; `sha256` becomes part of the file's name.

    `directory` itself may be a link. Raises ValueError if no file of prepared data is named so, if `sha256` is none, or
    if a link below `directory` leads out of it.
    """
    if not is_name(name):
        raise ValueError(
            f"{directory}: its manifest names a file {name[:80]!r}, and prepared data has none of this name; do not "
            "use this data, or copy it again from where it was prepared"
        )
    path = directory / name
    if sha256 is not None:
        if not is_sha256(sha256):
            raise ValueError(
                f"{path}: its manifest gives the SHA-256 {sha256[:80]!r}, which is none; do not use this data, or copy "
                "it again from where it was prepared"
            )
        path = path.with_name(f"{path.stem}.{sha256[:16]}{path.suffix}")
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory)):
        raise ValueError(
            f"{path}: is a link out of {directory}; replace it by the file itself, or make the whole directory a link"
        )
    return path
