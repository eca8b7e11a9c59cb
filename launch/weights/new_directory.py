"""A directory that is there with all its content, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...data.files import sync
from ...data.lock import HeldError, held

LOCK = ".longring"
"""File by which a directory that is being written is known; the process that writes it holds its lock."""
_WAYS_OUT = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f unlimited`)",
    **dict.fromkeys((errno.ENOTDIR, errno.ENAMETOOLONG, errno.EROFS), "name another directory"),
}


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield a directory beside `out`, which gets its name when all has been written without an error.

    Raises ValueError if `out` has content or cannot be renamed to, or if another command writes it, and OSError, with
    the file and a way out, if it cannot be written.
    """
    out = Path(os.path.realpath(out))  # a name, also of "." and of a link without a target
    partial = out.parent / f"{out.name}.partial"
    try:
        # Before the lock, whose file makes `partial`.
        _check_free(out, partial)
        with held(partial / LOCK):
            try:
                _clear(partial)  # of a command that was ended
                yield partial
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            sync(partial)  # before the rename: a power loss after it leaves no entry missing
            partial.rename(out)
            (out / LOCK).unlink()  # after it: without a lock, another command could clear `partial` until then
            sync(out)
            sync(out.parent)
    except HeldError as error:
        raise ValueError(f"{out}: is being written by {error}; wait for its end, or name another directory") from None
    except OSError as error:
        if error.errno is None:
            raise  # its text says already what is wrong
        file = str(error.filename or partial)
        where = out if file.startswith(str(partial)) else file
        way_out = _WAYS_OUT.get(error.errno, "allow this user to read and write there")
        raise OSError(f"{where}: {error.strerror}; {way_out}, and give the same command again") from error


def _check_free(out: Path, partial: Path) -> None:
    """Raise ValueError unless `partial` can be made, or cleared, and renamed to `out`."""
    if _has_content(out):
        raise ValueError(f"{out}: has content; name a new directory")
    if out.is_mount():
        raise ValueError(f"{out}: is a mount point, which no directory can replace; name a directory inside it")
    # On a full disk a command may have made the directory and no lock.
    if _has_content(partial) and not (partial / LOCK).is_file():
        raise ValueError(f"{partial}: is needed for unfinished files and was not made for them; move it away")


def _has_content(path: Path) -> bool:
    """Return whether there is anything at `path` but an empty directory."""
    return os.path.lexists(path) and (not path.is_dir() or any(path.iterdir()))


def _clear(directory: Path) -> None:
    """Remove everything but the lock."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
