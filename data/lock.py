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

log = logging.getLogger(__name__)


def now() -> str:
    """Return the present time as text, in UTC and to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class HeldError(Exception):
    """Another process holds the lock; the text says which one and since when."""


@contextmanager
def held(file: Path, *, wait_s: int = 0) -> Iterator[None]:
    """Hold the lock of `file`, which is made if absent. A file system without locks refuses nobody.

    Raises HeldError if another process still holds it after `wait_s` seconds.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as stream:
        for left_s in range(wait_s, -1, -1):
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not left_s:
                    stream.seek(0)
                    raise HeldError(stream.read().strip() or "another process") from None
                time.sleep(1)
            except OSError as error:  # a file system without locks
                log.warning("%s cannot be locked: %s", file, error)
                break
        with suppress(OSError):  # on a full disk the lock holds, and its holder is not known
            os.truncate(stream.fileno(), 0)
            os.write(stream.fileno(), f"process {os.getpid()} on {platform.node()} since {now()}\n".encode())
        yield
