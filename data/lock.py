"""A lock on a file, held by a process until it ends, for any reason."""

import fcntl
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

log = logging.getLogger(__name__)


def now() -> str:
    """Return the present time as text, in UTC and to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class HeldError(Exception):
    """Another process holds the lock; the text says which one and since when."""


def holder(file: Path) -> str | None:
    """Return the process that holds the lock of `file`, in words, or None if nobody does.

    Raises OSError on a file system without locks.
    """
    try:
        with file.open() as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that ask do not see each other
            except BlockingIOError:
                return stream.read().strip() or "another process"
    except FileNotFoundError:
        pass
    return None


@contextmanager
def held(file: Path, *, wait_s: int = 0) -> Iterator[None]:
    """Hold the lock of `file`, which is made if absent. A file system without locks refuses nobody.

    The holder may remove the file. Raises HeldError if another process still holds it after `wait_s` seconds.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + wait_s
    while (stream := _locked(file, last=time.monotonic() >= end)) is None:
        time.sleep(1)
    with stream:
        with suppress(OSError):  # on a full disk the lock holds, and its holder is not known
            # Not by `stream`, whose buffer would fail again when it closes.
            os.truncate(stream.fileno(), 0)
            os.write(stream.fileno(), f"process {os.getpid()} on {platform.node()} since {now()}\n".encode())
        yield


def _locked(file: Path, *, last: bool) -> TextIO | None:
    """Return `file`, open and locked, or None if another process holds it; at the `last` attempt raise HeldError."""
    while True:
        stream = file.open("a+")  # "w" would erase the name of the holder
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with stream:
                stream.seek(0)
                if last:
                    raise HeldError(stream.read().strip() or "another process") from None
                return None
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be locked: %s", file, error)
            return stream
        # The holder before may have removed the file after this process had opened it: a lock without a name excludes
        # nobody.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(stream.fileno()), file.stat()):
                return stream
        stream.close()
