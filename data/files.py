"""Writing files so that they are complete or absent, even after a power loss; hashes of files."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Write `file` so that no reader sees, and no crash leaves, an incomplete one.

    `write` gets a path in the same directory and writes the content there. The content is flushed to the disk, then the
    path is renamed to `file` and the directory is flushed. A failed write leaves an existing `file` as it was.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    begun = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        write(begun)
        sync(begun)  # before the rename: else a power loss can leave the name with an empty file
        begun.rename(file)
    except BaseException:
        begun.unlink(missing_ok=True)
        raise
    sync(file.parent)


def write_text(file: Path, text: str) -> None:
    """Write `text` in UTF-8 by `write_whole`."""
    write_whole(file, lambda begun: begun.write_text(text, encoding="utf-8"))


def sync(path: Path) -> None:
    """Flush the bytes of a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_json(content: Any) -> str:
    """Return the SHA-256 of a JSON value in hexadecimal, independent of the order of keys and of the layout."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
