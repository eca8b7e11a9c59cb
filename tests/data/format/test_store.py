import errno
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from longring.data import files as files_module
from longring.data.config import DataConfig, LoaderConfig
from longring.data.curriculum_config import CurriculumConfig
from longring.data.files import sha256_of
from longring.data.format import store as store_module
from longring.data.format.manifest import open_prepared
from longring.data.format.shards import ShardName
from longring.data.format.store import CachedStore
from longring.data.prepare.prepare import prepare
from longring.data.read.batch_order import ReplicaShare
from longring.data.read.loader import Loader
from longring.data.read.mix import training_order
from rich.console import Console


@pytest.fixture
def prepared(make_config: Callable[..., DataConfig], words: Callable[..., str]) -> Path:
    config = make_config([words(150 + number, number) for number in range(30)])
    prepare(config, Console(quiet=True))
    return Path(config.directory)


@pytest.fixture
def in_memory(prepared: Path) -> str:
    """Return the address of a copy of the prepared directory in fsspec's memory store."""
    address = f"memory://{uuid.uuid4().hex}"
    files = fsspec.filesystem("memory")
    for file in prepared.rglob("*"):
        if file.is_file():
            files.pipe(f"{address}/{file.relative_to(prepared)}", file.read_bytes())
    return address


def cached(tmp_path: Path, **settings: int) -> LoaderConfig:
    return LoaderConfig(cache_directory=str(tmp_path / "cache"), **settings)


def rows(directory: str | Path, config: LoaderConfig) -> list[list]:
    manifest = open_prepared(directory, config)
    order = training_order(manifest, CurriculumConfig(), config, steps=20, global_batch_tokens=256, seed=0)
    loader = Loader(manifest, order, config, lambda length: ReplicaShare(0, 1, 64 // length))
    return [batch.rows.tolist() for batch in loader.batches(0, 20)]


def kept(tmp_path: Path) -> list[Path]:
    return [file for file in (tmp_path / "cache").rglob("*.tar") if not file.name.startswith(".")]


@pytest.mark.parametrize("workers", [0, 4])
def test_a_remote_directory_reads_as_the_local_one(prepared: Path, in_memory: str, tmp_path: Path, workers: int):
    config = cached(tmp_path, workers=workers)
    assert rows(in_memory, config) == rows(prepared, LoaderConfig())
    assert {file.read_bytes() for file in kept(tmp_path)} <= {file.read_bytes() for file in prepared.rglob("*.tar")}
    fsspec.filesystem("memory").rm(f"{in_memory}/shards", recursive=True)
    assert rows(in_memory, config) == rows(prepared, LoaderConfig()), "shards come from the cache"


def test_over_http(prepared: Path, tmp_path: Path):
    handler = functools.partial(_Quiet, directory=str(prepared))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            found = rows(f"http://127.0.0.1:{server.server_address[1]}", cached(tmp_path))
        finally:
            server.shutdown()
            thread.join()
    assert found == rows(prepared, LoaderConfig())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_of_the_cache_is_named_after_one_download(
    prepared: Path, in_memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    real, downloads = Path.open, []

    def fail(self: Path, mode: str = "r", *arguments: Any, **options: Any):
        if mode == "wb":
            downloads.append(self)
            raise OSError(number, os.strerror(number))
        return real(self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", fail)
    for start in (1, 2):
        with pytest.raises(OSError, match=rf"^{tmp_path}/cache/\w+: the disk is full .*; make room"):
            rows(in_memory, cached(tmp_path))
        assert len(downloads) == start
    monkeypatch.undo()
    assert rows(in_memory, cached(tmp_path)) == rows(prepared, LoaderConfig())


@pytest.mark.parametrize("moment", ["before", "during"])
def test_a_cache_that_is_removed_is_not_the_fault_of_the_store(
    prepared: Path, in_memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
):
    """Another process removes the cache, when a file is locked and not begun, and in the middle of its download."""
    store = CachedStore(in_memory, tmp_path / "cache", 1 << 30)
    where, name = (store, "_fetch") if moment == "before" else (store._filesystem, "open")
    real = getattr(where, name)

    def remove(*arguments: Any, **options: Any) -> Any:
        shutil.rmtree(tmp_path / "cache")
        return real(*arguments, **options)

    monkeypatch.setattr(where, name, remove)
    for _ in range(2):
        with pytest.raises(
            OSError, match=rf"^{tmp_path}/cache/\w+: the cache was removed .*; start again, which fills it"
        ):
            store.path("tokenizer.json")
    monkeypatch.undo()
    assert store.path("tokenizer.json").read_bytes() == (prepared / "tokenizer.json").read_bytes()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def test_the_cache_keeps_to_its_limit(prepared: Path, in_memory: str, tmp_path: Path):
    sizes = [file.stat().st_size for file in prepared.rglob("train*.tar")]
    limit = 3 * max(sizes)
    assert rows(in_memory, cached(tmp_path, cache_bytes=limit)) == rows(prepared, LoaderConfig())
    assert 0 < sum(file.stat().st_size for file in kept(tmp_path)) <= limit < sum(sizes)


def four_shards() -> tuple[str, dict[str, bytes]]:
    """Return the address of four shards of ten bytes in fsspec's memory store, and their content by name."""
    address = f"memory://{uuid.uuid4().hex}"
    content = {ShardName(0, "train", 8, number).path(): f"{number}".encode() * 10 for number in range(4)}
    for name, value in content.items():
        fsspec.filesystem("memory").pipe(f"{address}/{name}", value)
    return address, content


def test_the_least_recently_used_goes_first(tmp_path: Path):
    address, content = four_shards()
    names, store = list(content), CachedStore(address, tmp_path, 30)
    for number in (0, 1, 2, 0, 3):
        name = names[number]
        assert store.path(name, hashlib.sha256(content[name]).hexdigest(), 10).read_bytes() == content[name]
    assert sorted(file.read_bytes()[:1] for file in tmp_path.rglob("*.tar")) == [b"0", b"2", b"3"]


def test_a_shard_that_was_just_downloaded_stays(tmp_path: Path):
    """The others seem to have been used later: the clock of the machine has been set back."""
    address, content = four_shards()
    store = CachedStore(address, tmp_path, 30)
    for name, value in content.items():
        file = store.path(name, hashlib.sha256(value).hexdigest(), 10)
        assert file.read_bytes() == value
        os.utime(file, (2**32, 2**32))
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.tar")) == 30


def test_a_copy_that_is_being_hashed_is_not_the_least_recently_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another process, which makes room meanwhile, would evict it otherwise."""
    address, content = four_shards()
    shards = [(name, hashlib.sha256(value).hexdigest()) for name, value in content.items()]
    first = CachedStore(address, tmp_path, 30)
    for name, sha256 in shards[:3]:
        os.utime(first.path(name, sha256, 10), (len(name), len(name)))

    def slow_hash(file: Path) -> str:
        first.path(*shards[3], 10)
        return sha256_of(file)

    monkeypatch.setattr(store_module, "sha256_of", slow_hash)
    file = CachedStore(address, tmp_path, 30).path(*shards[0], 10)
    assert file.read_bytes() == content[shards[0][0]]


def test_a_copy_that_an_earlier_start_left_is_hashed_once_on_a_machine(
    prepared: Path, in_memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A flipped bit in the cache is found and fetched again; what another process that runs has hashed is not read."""
    before = rows(prepared, LoaderConfig())
    hashed: list[Path] = []
    monkeypatch.setattr(store_module, "sha256_of", lambda file: hashed.append(file) or sha256_of(file))
    assert rows(in_memory, cached(tmp_path)) == before
    assert not hashed, "what is downloaded is hashed on the way"
    for file in kept(tmp_path):
        content = bytearray(file.read_bytes())
        content[3_000] ^= 1
        file.write_bytes(content)
    assert rows(in_memory, cached(tmp_path)) == before
    assert sorted(file for file in hashed if file.suffix == ".tar") == sorted(kept(tmp_path)), "each one once"

    hashed.clear()
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    [claims] = (tmp_path / "cache").rglob(".hashed.lock")
    command = [sys.executable, "-c", code, str(claims)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "1\n"
        assert rows(in_memory, cached(tmp_path)) == before
        assert not hashed, "the other process has hashed them"
        other.communicate("\n")


def test_an_altered_remote_shard_is_named_with_both_hashes(prepared: Path, in_memory: str, tmp_path: Path):
    shard = min(prepared.rglob("train*.tar"))
    name = shard.relative_to(prepared).as_posix()
    altered = shard.read_bytes()[:-600] + b"x" + shard.read_bytes()[-599:]
    fsspec.filesystem("memory").pipe(f"{in_memory}/{name}", altered)
    with pytest.raises(ValueError, match="SHA-256") as error:
        list(open_prepared(in_memory, cached(tmp_path)).verify())
    found, expected = hashlib.sha256(altered).hexdigest(), hashlib.sha256(shard.read_bytes()).hexdigest()
    assert f"{in_memory}/{name}: SHA-256 is {found}, {expected} in the manifest" in str(error.value)
    assert not [file for file in kept(tmp_path) if file.name.startswith(shard.stem)]


def test_a_shard_that_is_not_there(prepared: Path, in_memory: str, tmp_path: Path):
    advice = "copy the prepared directory there"
    fsspec.filesystem("memory").rm(f"{in_memory}/shards", recursive=True)
    with pytest.raises(ValueError, match=rf"{in_memory}/shards/.*tar: does not exist; {advice}"):
        rows(in_memory, cached(tmp_path))
    for file in prepared.rglob("*.tar"):
        fsspec.filesystem("memory").pipe(f"{in_memory}/{file.relative_to(prepared)}", file.read_bytes())
    assert rows(in_memory, cached(tmp_path)) == rows(prepared, LoaderConfig())


def test_a_store_that_fails_is_asked_again(in_memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    waits: list[float] = []
    monkeypatch.setattr(files_module.time, "sleep", waits.append)
    config = cached(tmp_path, workers=0)
    before = rows(in_memory, cached(tmp_path / "other", workers=0))
    files, failures = fsspec.filesystem("memory"), 3
    whole = type(files).open

    def failing(self, *arguments, **options):
        nonlocal failures
        if failures:
            failures -= 1
            raise ConnectionError("reset by peer")
        return whole(self, *arguments, **options)

    monkeypatch.setattr(type(files), "open", failing)
    assert rows(in_memory, config) == before
    assert waits == [1, 2, 4]
    failures = 4
    with pytest.raises(OSError, match=rf"{in_memory}/manifest\.json: cannot be read after 4 .*reset by peer"):
        rows(in_memory, config)


def test_processes_of_a_machine_download_once(in_memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Eight stores, like those of eight ranks, ask for the same shard at once, and it is downloaded once."""
    downloads: list[str] = []
    download = CachedStore._download
    monkeypatch.setattr(
        CachedStore, "_download", lambda self, name, *others: downloads.append(name) or download(self, name, *others)
    )
    manifest = open_prepared(in_memory, cached(tmp_path))
    bucket = manifest.buckets("train")[-1]
    stores: Iterator = (open_prepared(in_memory, cached(tmp_path)) for _ in range(8))
    readers = [store.reader(bucket) for store in stores]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda reader: reader.read(np.arange(4)).tolist(), readers))
    assert all(one == found[0] for one in found)
    shards = [name for name in downloads if name.endswith(".tar")]
    assert len(shards) == len(set(shards)) >= 1


@pytest.mark.parametrize(
    ("directory", "cache", "words"),
    [
        ("s3://bucket/data", "", ["data.directory = s3://bucket/data", "loader.cache_directory = ''"]),
        ("nosuch://data", "x", ["data.directory = nosuch://data", "cannot be opened"]),
    ],
)
def test_a_remote_directory_that_cannot_be_opened(tmp_path: Path, directory: str, cache: str, words: list[str]):
    with pytest.raises(ValueError, match=r"data\.directory = ") as error:
        open_prepared(directory, LoaderConfig(cache_directory=cache and str(tmp_path / cache)))
    assert all(word in str(error.value) for word in words), error.value
