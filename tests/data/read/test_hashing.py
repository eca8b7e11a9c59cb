"""Shards are hashed once, beside the training that reads them; what is wrong with one is said in one line."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from longring.data import files as files_module
from longring.data.config import DataConfig, LoaderConfig
from longring.data.curriculum_config import CurriculumConfig
from longring.data.files import sha256_of
from longring.data.format import shard_file
from longring.data.format.damage import DamagedDataError
from longring.data.format.manifest import Manifest, open_prepared
from longring.data.format.reader import SequenceReader
from longring.data.format.shards import INDEX_DTYPE, shard_name
from longring.data.prepare.prepare import prepare
from longring.data.read import hashing
from longring.data.read.batch_order import ReplicaShare
from longring.data.read.loader import Loader, MicroBatch
from longring.data.read.mix import training_order
from rich.console import Console

STEPS, BATCH_TOKENS = 24, 256
QUIET = Console(quiet=True)


@pytest.fixture
def config(make_config: Callable[..., DataConfig], words: Callable[..., str]) -> DataConfig:
    return make_config([words(20 + 9 * number, number) for number in range(40)], rest="pack")


@pytest.fixture
def manifest(config: DataConfig) -> Manifest:
    return prepare(config, QUIET, workers=1)


def loader(manifest: Manifest, rank: int = 0, world: int = 1, **settings: Any) -> Loader:
    config = LoaderConfig(**settings)
    order = training_order(manifest, CurriculumConfig(), config, steps=STEPS, global_batch_tokens=BATCH_TOKENS, seed=5)
    return Loader(
        manifest, order, config, lambda length: ReplicaShare(rank, world, 32 // length), hashed_by=(rank, world)
    )


def batches(manifest: Manifest, **settings: int) -> list[MicroBatch]:
    return list(loader(manifest, **settings).batches(0, STEPS))


def path_of(manifest: Manifest, number: int) -> Path:
    return Path(manifest.store.name, shard_name(manifest.shards[number]).path())


def first_read(manifest: Manifest) -> tuple[Path, int]:
    """Return the file and the index in the table of the shard that step 1 reads first."""
    found = loader(manifest)
    stretch = found.order.batch(1)[0]
    reader = found._readers[stretch.bucket]
    path = reader.path(int(reader.shards_of(found.order.sequences(stretch))[0]))
    names = [path_of(manifest, number) for number in range(len(manifest.shards))]
    return path, names.index(path)


def flip_token(path: Path) -> None:
    """Change a token to another one of the vocabulary, which nothing but the hash can tell."""
    content = bytearray(path.read_bytes())
    start = content.index(b".tokens.npy") // 512 * 512 + 512 + 128
    content[start + 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_each_shard_that_is_read_is_hashed_once_by_one_rank(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, world: int, workers: int
):
    hashed: list[Path] = []
    verify = SequenceReader.verify

    def counted(self: SequenceReader, number: int, *arguments: object) -> None:
        hashed.append(self.path(number))
        verify(self, number, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(SequenceReader, "verify", counted)
    read: set[Path] = set()
    for rank in range(world):
        mine = loader(manifest, rank, world, workers=workers)
        first = list(mine.batches(0, STEPS // 2))
        assert first + list(mine.batches(STEPS // 2, STEPS)), "a second pass over steps hashes nothing again"
        list(mine.batches(0, STEPS))
    whole = loader(manifest)
    for step in range(1, STEPS + 1):
        for stretch in whole.order.batch(step):
            reader = whole._readers[stretch.bucket]
            read |= {reader.path(number) for number in np.unique(reader.shards_of(whole.order.sequences(stretch)))}
    assert sorted(hashed) == sorted(read)
    assert len(read) > 10


@pytest.mark.parametrize("workers", [0, 2])
def test_a_changed_token_is_found_and_the_advice_mends_it(config: DataConfig, manifest: Manifest, workers: int):
    before = [batch.rows.tolist() for batch in batches(manifest)]
    path, number = first_read(manifest)
    flip_token(path)
    expected = manifest.shards["sha256"][number].decode()
    for _ in range(2):
        with pytest.raises(DamagedDataError) as error:
            batches(open_prepared(config.directory), workers=workers)
        assert str(error.value) == (
            f"{path}: SHA-256 is {sha256_of(path)}, {expected} in the manifest, and step 1 reads it, so checkpoints "
            "from step 1 on may have trained on it; run `longring prepare RECIPE --verify`, which makes it again"
        )
    assert [batch.rows.tolist() for batch in batches(manifest, hash_bytes_per_s=0)] != before, "off: nobody looks"
    prepare(config, QUIET, workers=1)
    assert sha256_of(path) != expected, "without --verify a shard of the right size is not read"
    prepare(config, QUIET, workers=1, verify=True)
    for _ in range(2):
        assert [batch.rows.tolist() for batch in batches(open_prepared(config.directory))] == before


@pytest.mark.parametrize("tokens", [1, 32])
def test_an_index_that_is_shifted_is_found(manifest: Manifest, tokens: int):
    """A shift by a token breaks the alignment of arrays, and one by 64 bytes is left to the hash."""
    path, number = first_read(manifest)
    content, begin = bytearray(path.read_bytes()), int(manifest.shards["index_offset"][number])
    index = np.frombuffer(content, INDEX_DTYPE, int(manifest.shards["samples"][number]), begin).copy()
    index["tokens_offset"] += 2 * tokens
    content[begin : begin + index.nbytes] = index.tobytes()
    path.write_bytes(content)
    with pytest.raises(
        DamagedDataError, match=rf"{path}: .*SHA-256 is .* in the manifest.*; run `longring prepare RECIPE"
    ):
        batches(manifest)


def test_a_token_outside_the_vocabulary_is_named_before_the_model_sees_it(manifest: Manifest):
    path, number = first_read(manifest)
    expected = manifest.shards["sha256"][number].decode()
    content = bytearray(path.read_bytes())
    start = content.index(b".tokens.npy") // 512 * 512 + 512 + 128
    content[start + 2 : start + 4] = b"\xff\xff"
    path.write_bytes(content)
    with pytest.raises(DamagedDataError) as error:
        batches(manifest, hash_bytes_per_s=0)
    said = str(error.value)
    assert f"{path}: SHA-256 is {sha256_of(path)}, {expected} in the manifest, and sequence " in said
    assert f": token 1 is 65535, outside the vocabulary of {manifest.vocab_size}; run `longring prepare RECIPE" in said


def test_a_slow_disk_holds_nothing_up_but_the_last_step(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A chunk takes its share of the bandwidth: nothing else waits, and a generator that is closed ends at once."""
    waits: list[float] = []
    waiting = threading.Event()

    def wait(self: threading.Event, timeout: float | None = None) -> bool:
        if threading.current_thread().name == "hashing" and timeout is not None:
            waits.append(timeout)
            waiting.set()
        return real(self, timeout)

    real = threading.Event.wait
    monkeypatch.setattr(threading.Event, "wait", wait)
    found = loader(manifest, hash_bytes_per_s=1).batches(0, STEPS)
    per_step = BATCH_TOKENS // 32
    for _ in range(per_step * (STEPS // 2)):
        next(found)
    assert waiting.wait(60)
    found.close()
    assert "hashing" not in [thread.name for thread in threading.enumerate()]
    assert hashing.CHUNK_BYTES / 2 < waits[0] <= hashing.CHUNK_BYTES
    assert len(list(loader(manifest, hash_bytes_per_s=1).batches(0, STEPS))) == per_step * STEPS
    assert not caplog.messages, "the last step waits for the hashes, and they no more for the bandwidth"


def failing(monkeypatch: pytest.MonkeyPatch, module: object, name: str, number: int, times: int) -> list[OSError]:
    """Let a function of `os` fail for shards the first `times` times; return the failures that are left."""
    left = [OSError(number, os.strerror(number)) for _ in range(times)]
    real = getattr(module, name)

    def fail(*arguments: object, **options: object) -> object:
        if left:
            raise left.pop()
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, fail)
    monkeypatch.setattr(files_module.time, "sleep", lambda _: None)
    return left


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("name", ["open", "preadv"])
def test_a_shard_that_cannot_be_read_is_tried_again_and_never_called_damaged(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, number: int, name: str
):
    before = [batch.rows.tolist() for batch in batches(manifest, workers=0)]
    left = failing(monkeypatch, shard_file.os, name, number, 3)
    assert [batch.rows.tolist() for batch in batches(manifest, workers=0, hash_bytes_per_s=0)] == before
    assert not left
    monkeypatch.undo()
    failing(monkeypatch, shard_file.os, name, number, 4)
    with pytest.raises(
        OSError, match=rf"\.tar: cannot be read after 4 attempts .*{os.strerror(number)}.*; start again"
    ):
        batches(manifest, workers=0, hash_bytes_per_s=0)
    monkeypatch.undo()
    assert [batch.rows.tolist() for batch in batches(manifest, workers=0)] == before


def test_a_shard_that_cannot_be_hashed_is_not_called_damaged(manifest: Manifest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files_module.time, "sleep", lambda _: None)
    real = Path.open

    def fail(self: Path, *arguments: object, **options: object):
        if options.get("buffering") == 0:  # only hashing reads without a buffer
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(OSError, match=r"\.tar: cannot be read after 4 attempts .*Input/output error"):
        batches(manifest)


def test_a_shard_that_goes_away_or_shrinks_while_it_is_read(manifest: Manifest):
    found = loader(manifest, workers=0, hash_bytes_per_s=0)
    first = list(found.batches(0, STEPS))
    path, _ = first_read(manifest)
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole)
    assert [batch.rows.tolist() for batch in found.batches(0, STEPS)] == [batch.rows.tolist() for batch in first]
    os.truncate(path, 600)
    with pytest.raises(DamagedDataError, match=r"\.tar: 600 bytes with SHA-256"):
        batches(manifest)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{path}: missing, {len(whole)} bytes in the manifest; run"):
        batches(manifest)
    path.write_bytes(whole)
    assert [batch.rows.tolist() for batch in batches(manifest)] == [batch.rows.tolist() for batch in first]
