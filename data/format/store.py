"""Where prepared data lies: a directory here, or a remote one whose files are kept on a local disk.

Any store that fsspec knows will do (s3, gcs, http, ...). A file is downloaded under another name, checked against its
SHA-256 and renamed, one process of a machine at a time; when the cache is over its limit, the files least recently
opened go. A file that is in use when it goes stays readable for who has it open.
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
"""A store that fails is asked again after 1, 2 and 4 seconds."""


class Store(Protocol):
    """Gives files of prepared data as local paths."""

    name: str
    """The directory or address, for messages."""

    def path(self, name: str, sha256: str | None = None) -> Path:
        """Return where file `name` is to be read; one fetched from elsewhere has `sha256`, or ValueError tells both."""
        ...


class LocalStore:
    """A directory of this machine."""

    def __init__(self, directory: Path):
        self.name = str(directory)
        self.directory = directory

    def path(self, name: str, sha256: str | None = None) -> Path:
        """Return the file's path, whether it is there or not."""
        return self.directory / name


class CachedStore:
    """A remote directory, its files kept in `cache` up to `limit_bytes`."""

    def __init__(self, address: str, cache: Path, limit_bytes: int):
        self.name = address.rstrip("/")
        from fsspec.core import url_to_fs  # takes a second that local data does without

        try:
            self._filesystem, self._root = url_to_fs(self.name)
        except (ImportError, ValueError) as error:
            raise ValueError(f"data.directory = {address} cannot be opened: {error}") from error
        self._cache = cache / hashlib.sha256(self.name.encode()).hexdigest()[:16]
        self._limit_bytes = limit_bytes

    def path(self, name: str, sha256: str | None = None) -> Path:
        """Return the file's local path, downloading it if it is not there; without `sha256` it is fetched anew."""
        file = self._cache / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with self._locked(hashlib.sha256(name.encode()).hexdigest()[:2]):
            if sha256 is None or not file.is_file():
                self._fetch(name, file, sha256)
        os.utime(file)
        return file

    def _fetch(self, name: str, file: Path, sha256: str | None) -> None:
        begun = file.with_name(f".{os.getpid()}.{threading.get_ident()}.{file.name}")
        try:
            found = self._download(name, begun)
            if sha256 is not None and found != sha256:
                raise ValueError(
                    f"{self.name}/{name} has SHA-256 {found}, {sha256} in the manifest; copy it there again, or "
                    "prepare the data again"
                )
            begun.rename(file)
        finally:
            begun.unlink(missing_ok=True)
        with self._locked("all"):
            self._evict(keep=file)

    def _download(self, name: str, file: Path) -> str:
        """Return the SHA-256 of what came."""
        for attempt in range(ATTEMPTS):
            digest = hashlib.sha256()
            try:
                with self._filesystem.open(f"{self._root}/{name}", "rb") as remote, file.open("wb") as local:
                    while chunk := remote.read(CHUNK_BYTES):
                        digest.update(chunk)
                        local.write(chunk)
                return digest.hexdigest()
            except FileNotFoundError as error:
                raise ValueError(
                    f"{self.name}/{name} does not exist; run longring prepare, or copy it there"
                ) from error
            except OSError as error:
                if attempt == ATTEMPTS - 1:
                    raise OSError(f"{self.name}/{name} cannot be read after {ATTEMPTS} attempts: {error}") from error
                time.sleep(2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _evict(self, keep: Path) -> None:
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
        with (self._cache / f".{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def open_store(directory: str | Path, loader: LoaderConfig | None = None) -> Store:
    """Return the store of prepared data; an address with "://" is remote and needs `loader.cache_directory`."""
    if "://" not in str(directory):
        return LocalStore(Path(directory))
    if loader is None or not loader.cache_directory:
        raise ValueError(
            f"data.directory = {directory} is remote and loader.cache_directory is empty; name a directory on a disk "
            "of this machine"
        )
    return CachedStore(str(directory), Path(loader.cache_directory), loader.cache_bytes)


def differs(file: str | Path, found: Path, sha256: str) -> str:
    """Return the words for a file that is not what the manifest says."""
    return f"{file} has SHA-256 {sha256_of(found)}, {sha256} in the manifest; run longring prepare again"
