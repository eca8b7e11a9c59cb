"""Storage of prepared data: a local directory, or a remote one whose files are cached on a local disk.

A remote directory may be on any store that fsspec knows (s3, gcs, http, ...). A file is downloaded under a temporary
name, checked against its SHA-256 and renamed, by one process of a machine at a time. When the cache exceeds its limit,
the least recently opened files are removed; a process that has such a file open can still read it.
"""

import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from ..config import LoaderConfig
from ..files import sha256_of

CHUNK_BYTES = 1 << 22
ATTEMPTS = 4
"""Number of attempts to read a file from a store; the pauses between them are 1, 2 and 4 seconds."""


class Store(Protocol):
    """Storage that gives the files of prepared data as local paths."""

    name: str
    """Directory or address, for messages."""

    def path(self, name: str, sha256: str | None = None, *, anew: bool = False) -> Path:
        """Return the local path of file `name`; `anew` replaces a cached copy.

        Raises ValueError if a file that is fetched has another SHA-256 than `sha256`.
        """
        ...


class LocalStore:
    """Local directory."""

    def __init__(self, directory: Path):
        self.name = str(directory)
        self.directory = directory

    def path(self, name: str, sha256: str | None = None, *, anew: bool = False) -> Path:
        """Return the path of file `name`, whether it exists or not."""
        return self.directory / name


class CachedStore:
    """Remote directory whose files are cached under `cache`; its shards take up to `limit_bytes` there.

    Raises ValueError if fsspec cannot open the address.
    """

    def __init__(self, address: str, cache: Path, limit_bytes: int):
        self.name = address.rstrip("/")
        from fsspec.core import url_to_fs  # the import takes a second, which local data need not spend

        try:
            self._filesystem, self._root = url_to_fs(self.name)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"data.directory = {address}: cannot be opened ({error}); correct the address, or install the fsspec "
                "package of its protocol"
            ) from error
        self._cache = cache / hashlib.sha256(self.name.encode()).hexdigest()[:16]
        self._limit_bytes = limit_bytes

    def path(self, name: str, sha256: str | None = None, *, anew: bool = False) -> Path:
        """Return the local path of file `name`; download it if it is not cached, if `anew`, or without `sha256`.

        Raises ValueError if the remote file is missing or has another SHA-256, and OSError if the store keeps failing.
        """
        file = self._cache / name
        if sha256 is not None:
            # The hash in the name keeps the files of older data at the same address from being taken for these.
            file = file.with_name(f"{file.stem}.{sha256[:16]}{file.suffix}")
        file.parent.mkdir(parents=True, exist_ok=True)
        # One of 256 locks, by name: one process downloads a file while others download other files.
        with self._locked(hashlib.sha256(name.encode()).hexdigest()[:2]):
            if sha256 is None or anew or not file.is_file():
                self._fetch(name, file, sha256)
        os.utime(file)  # the time of the last use, by which _evict sorts
        return file

    def _fetch(self, name: str, file: Path, sha256: str | None) -> None:
        """Download file `name` to `file`, which appears whole and checked, then keep the cache to its limit."""
        begun = file.with_name(f".{os.getpid()}.{threading.get_ident()}.{file.name}")
        try:
            found = self._download(name, begun)
            if sha256 is not None and found != sha256:
                raise ValueError(
                    f"{self.name}/{name}: SHA-256 is {found}, {sha256} in the manifest; copy the file there again from "
                    "where the data was prepared"
                )
            begun.rename(file)
        finally:
            begun.unlink(missing_ok=True)
        with self._locked("all"):
            self._evict(keep=file)

    def _download(self, name: str, file: Path) -> str:
        """Write the remote file to `file`; return its SHA-256."""
        for attempt in range(ATTEMPTS):
            digest = hashlib.sha256()
            try:
                with self._filesystem.open(f"{self._root}/{name}", "rb") as remote, file.open("wb") as local:
                    while chunk := remote.read(CHUNK_BYTES):
                        digest.update(chunk)
                        local.write(chunk)
                return digest.hexdigest()
            except FileNotFoundError as error:
                raise ValueError(f"{self.name}/{name}: does not exist; copy the prepared directory there") from error
            except OSError as error:
                if attempt == ATTEMPTS - 1:
                    raise OSError(
                        f"{self.name}/{name}: cannot be read after {ATTEMPTS} attempts ({error}); start again when the "
                        "store answers"
                    ) from error
                time.sleep(2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _evict(self, keep: Path) -> None:
        """Remove the least recently used shards, but not `keep`, until the others take at most the limit."""
        # A name that begins with "." is a download in progress.
        shards = [(file, file.stat()) for file in self._cache.rglob("*.tar") if not file.name.startswith(".")]
        total = sum(status.st_size for _, status in shards)
        for file, status in sorted(shards, key=lambda entry: entry[1].st_mtime_ns):
            if total <= self._limit_bytes:
                return
            if file != keep:
                file.unlink(missing_ok=True)
                total -= status.st_size

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold lock `name` of the cache, which one thread of one process of the machine holds at a time."""
        with (self._cache / f".{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def open_store(directory: str | Path, loader: LoaderConfig | None = None) -> Store:
    """Return the store of prepared data in `directory`, which is remote if it contains "://".

    Raises ValueError if it is remote and `loader.cache_directory` is empty, or if it cannot be opened.
    """
    if "://" not in str(directory):
        return LocalStore(Path(directory))
    if loader is None or not loader.cache_directory:
        raise ValueError(
            f"loader.cache_directory = '': data.directory = {directory} is remote and needs a cache; set it to a "
            "directory on a local disk"
        )
    return CachedStore(str(directory), Path(loader.cache_directory), loader.cache_bytes)


def damaged_shard(file: Path, size_bytes: int, sha256: str, command: str) -> ValueError | None:
    """Return the error of a shard that is missing or does not have `size_bytes` bytes; None if its size is right.

    The message advises to run `command`, which made the data and repairs it.
    """
    if not file.is_file():
        found = f"missing, {size_bytes} bytes in the manifest"
    elif (size := file.stat().st_size) != size_bytes:
        found = f"{size} bytes with SHA-256 {sha256_of(file)}, {size_bytes} bytes with SHA-256 {sha256} in the manifest"
    else:
        return None
    return ValueError(f"{file}: {found}; run `{command} RECIPE`, which makes it again")
