"""Writing files so that they are complete or absent, even after a power loss; patient reading; hashes of files."""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

ATTEMPTS = 4
"""Number of attempts to read a file; the pauses between them are 1, 2 and 4 seconds."""

T = TypeVar("T")

# The last is numpy's: "N requested and M written".
_FULL_DISK = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "requested and")


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Write `file` so that no reader sees, and no crash leaves, an incomplete one.

    `write` gets a path in the same directory and writes the content there. The content is flushed to the disk, then the
    path is renamed to `file` and the directory is flushed. A failed write leaves an existing `file` as it was.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    begun = file.with_name(f".{os.getpid()}.{file.name}")  # processes that write the same file each have their own
    try:
        write(begun)
        sync(begun)  # before the rename: else a power loss can leave the name with an empty file
        begun.rename(file)
    except BaseException:
        begun.unlink(missing_ok=True)
        raise
    sync(file.parent)  # else a power loss can undo the rename


def write_text(file: Path, text: str) -> None:
    """Write `text` in UTF-8 by `write_whole`."""
    write_whole(file, lambda begun: begun.write_text(text, encoding="utf-8"))


def copy_whole(source: Path, target: Path) -> None:
    """Copy the content of the file `source` to `target` by `write_whole`."""
    write_whole(target, partial(shutil.copyfile, source))


def sync(path: Path) -> None:
    """Flush the bytes of a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_patiently(name: object, read: Callable[[], T]) -> T:
    """Return `read()`, tried up to ATTEMPTS times while it raises OSError: storage that fails may answer again.

    Raises FileNotFoundError and the error of a full disk at once, and after the last attempt an OSError with the file's
    `name` and the reason.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return read()
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # of a copy that `read` writes
                raise
            if attempt == ATTEMPTS:
                raise OSError(
                    f"{name}: cannot be read after {ATTEMPTS} attempts ({error}); start again when its storage answers"
                ) from error
        time.sleep(2 ** (attempt - 1))
    raise AssertionError("the last attempt returns or raises")


@contextmanager
def full_disk_named(directory: Path) -> Iterator[None]:
    """Have an error of a full disk name `directory`, in which the context writes, and say what to do."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # numpy and faiss have errors of their own for it
        if not any(word in str(error) for word in _FULL_DISK):
            raise
        there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        raise OSError(
            f"{directory}: the disk is full ({error}; {free:,} bytes are free now that unfinished files are removed); "
            "make room, and the same command continues"
        ) from error


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_json(content: Any) -> str:
    """Return the SHA-256 of a JSON value in hexadecimal, independent of the order of keys and of the layout."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
