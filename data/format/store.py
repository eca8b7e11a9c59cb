"""Storage of prepared data: a local directory, or a remote one whose files are cached on a local disk.

A remote directory may be on any store that fsspec knows (s3, gcs, http, ...). A file is downloaded under a temporary
name, checked against its SHA-256 and renamed, by one process of a machine at a time. A file that an earlier start has
left is hashed again by the first process of the machine that opens it. When the cache exceeds its limit, the least
recently opened files are removed; a process that has such a file open can still read it.
"""

import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Protocol

from ..config import LoaderConfig
from ..files import full_disk_named, read_patiently, sha256_of
from .names import MAX_BYTES, path_of

CHUNK_BYTES = 1 << 22


class Store(Protocol):
    """Storage that gives the files of prepared data as local paths."""

    name: str
    """Directory or address, for messages."""

    def path(self, name: str, sha256: str | None = None, size_bytes: int = 0, *, anew: bool = False) -> Path:
        """Return the local path of file `name`; `anew` replaces a cached copy. `size_bytes` is the size of a shard.

        Raises ValueError if prepared data has no file of this name, or if a file that is fetched is not `sha256`.
        """
        ...


class LocalStore:
    """Local directory."""

    def __init__(self, directory: Path):
        self.name = str(directory)
        self.directory = directory

    def path(self, name: str, sha256: str | None = None, size_bytes: int = 0, *, anew: bool = False) -> Path:
        """Return the path of file `name`, whether it exists or not. Raises ValueError as `path_of` does."""
        return path_of(self.directory, name)


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
        self._opened: set[Path] = set()
        self._claims: IO[str] | None = None

    def path(self, name: str, sha256: str | None = None, size_bytes: int = 0, *, anew: bool = False) -> Path:
        """Return the local path of file `name`; download it if it is not cached whole, if `anew`, or without `sha256`.

        Raises ValueError if the remote file is missing, larger than it may be or has another SHA-256, and OSError if
        the store keeps failing, or if the cache is full or removed.
        """
        # The hash in the name keeps the files of older data at the same address from being taken for these.
        file = path_of(self._cache, name, sha256)
        most = size_bytes or MAX_BYTES[name]
        if size_bytes > self._limit_bytes:
            raise ValueError(
                f"loader.cache_bytes = {self._limit_bytes}: {self.name}/{name} has {size_bytes} bytes by its manifest; "
                "raise it"
            )
        try:
            with full_disk_named(self._cache):
                file.parent.mkdir(parents=True, exist_ok=True)
                # One of 256 locks, by name: one process downloads a file while others download other files.
                with self._locked(hashlib.sha256(name.encode()).hexdigest()[:2]):
                    with suppress(FileNotFoundError):
                        os.utime(file)  # before it is hashed, so that no other process evicts it meanwhile
                    if sha256 is None or anew or not self._is_whole(file, sha256):
                        self._fetch(name, file, sha256, most)
                os.utime(file)  # the time of the last use, by which _evict sorts
        except FileNotFoundError as error:
            raise OSError(
                f"{self._cache}: the cache was removed while it was used ({error}); start again, which fills it again"
            ) from error
        return file

    def _is_whole(self, file: Path, sha256: str) -> bool:
        """Return whether a file is cached; the first process that asks hashes it."""
        first = self._is_first(file, sha256)
        return file.is_file() and (not first or read_patiently(file, lambda: sha256_of(file)) == sha256)

    def _is_first(self, file: Path, sha256: str) -> bool:
        """Return whether this call is the first for a cached file among all processes of the machine that run now."""
        if file in self._opened:
            return False
        self._opened.add(file)
        if self._claims is None:
            self._claims = (self._cache / ".hashed.lock").open("a")
        try:
            # One byte of the lock file stands for each hash, and is locked until the process ends that has it.
            fcntl.lockf(self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(sha256[:15], 16))
        except BlockingIOError:
            return False
        return True

    def _fetch(self, name: str, file: Path, sha256: str | None, most: int) -> None:
        """Download file `name`, of `most` bytes at most, to `file`, which appears whole and checked; then evict."""
        begun = file.with_name(f".{os.getpid()}.{threading.get_ident()}.{file.name}")
        try:
            found = self._download(name, begun, most)
            if sha256 is not None and found != sha256:
                raise ValueError(
                    f"{self.name}/{name}: SHA-256 is {found}, {sha256} in the manifest; copy the file there again from "
                    "where the data was prepared"
                )
            begun.rename(file)
        finally:
            begun.unlink(missing_ok=True)
        # `_evict` takes the size of each file that it lists, so no other eviction may remove one meanwhile.
        with self._locked("all"):
            self._evict(keep=file)

    def _download(self, name: str, file: Path, most: int) -> str:
        """Write the remote file, of `most` bytes at most, to `file`; return its SHA-256."""
        where = f"{self._root}/{name}"

        def download() -> str:
            digest, left = hashlib.sha256(), most
            with file.open("wb") as local, self._remote_errors(name), self._filesystem.open(where, "rb") as remote:
                # One byte more than `left` is asked for, which tells a file that is too large.
                while chunk := remote.read(min(CHUNK_BYTES, left + 1)):
                    left -= len(chunk)
                    if left < 0:
                        break
                    digest.update(chunk)
                    local.write(chunk)
            if left < 0:
                raise ValueError(
                    f"{self.name}/{name}: has more than the {most} bytes that it may have; copy the file there again "
                    "from where the data was prepared"
                )
            return digest.hexdigest()

        return read_patiently(f"{self.name}/{name}", download)

    @contextmanager
    def _remote_errors(self, name: str) -> Iterator[None]:
        """Raise ValueError if the store says in the context that it has no file `name`, and OSError if it fails."""
        try:
            yield
        except FileNotFoundError as error:
            # fsspec's HTTP client raises FileNotFoundError for every error status; its cause has the status.
            cause = error.__cause__
            if type(cause).__module__.startswith("aiohttp") and getattr(cause, "status", None) not in (404, 410):
                raise OSError(f"{type(cause).__name__}: {cause}") from error
            raise ValueError(f"{self.name}/{name}: does not exist; copy the prepared directory there") from error
        except OSError:
            raise
        except Exception as error:  # the client of each protocol has errors of its own
            raise OSError(f"{type(error).__name__}: {error}") from error

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
