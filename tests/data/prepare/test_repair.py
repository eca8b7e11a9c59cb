"""Damaged data: each error of prepared data says what to do, and doing it gives the data as it was."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import fsspec
import pytest
from helpers.files import tree
from longring.data.config import DataConfig, LoaderConfig, SourceConfig
from longring.data.files import sha256_of
from longring.data.format.manifest import open_prepared
from longring.data.prepare import prepare as prepare_module
from longring.data.prepare.prepare import prepare, prepare_part
from rich.console import Console

MakeConfig = Callable[..., DataConfig]
Words = Callable[..., str]


@pytest.fixture
def config(make_config: MakeConfig, words: Words, tmp_path: Path) -> DataConfig:
    """Return the settings of data with five input shards."""
    base = make_config([], held_out_fraction=0.1, input_shard_bytes=1)
    Path(base.source.path).unlink()
    (tmp_path / "corpus").mkdir()
    for part in range(5):
        lines = [json.dumps({"text": words(90 + 11 * number, 50 * part + number)}) + "\n" for number in range(9)]
        (tmp_path / "corpus" / f"{part}.jsonl").write_text("".join(lines))
    return replace(base, source=SourceConfig(kind="json", path=str(tmp_path / "corpus")))


@pytest.fixture
def whole(config: DataConfig, console: Console) -> dict[str, bytes]:
    """Prepare the data and return the content of its files before any damage."""
    prepare(config, console, workers=1)
    return tree(config.directory)


def shards(config: DataConfig) -> list[Path]:
    return sorted(Path(config.directory).glob("shards/*/train*.tar"))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[3_000] ^= 1
    file.write_bytes(content)


def prepared_shards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the input shards that are prepared from here on."""
    found: list[int] = []
    run = prepare_module._run_here
    monkeypatch.setattr(prepare_module, "_run_here", lambda *args: found.extend(args[3]) or run(*args))
    return found


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-512])])
def test_the_same_command_makes_missing_and_truncated_shards_again(
    config: DataConfig, whole: dict[str, bytes], console: Console, monkeypatch: pytest.MonkeyPatch, damage: Callable
):
    damaged = [shards(config)[0], shards(config)[-1]]
    for file in damaged:
        damage(file)
    with pytest.raises(ValueError, match=r"run `longring prepare RECIPE`, which makes it again"):
        open_prepared(config.directory)
    done = prepared_shards(monkeypatch)
    prepare(config, console, workers=1)
    assert done == [0, 4]
    open_prepared(config.directory)
    assert tree(config.directory) == whole
    assert not Path(f"{config.directory}.partial").exists()


@pytest.mark.full
def test_a_lost_directory_of_shards_comes_back(config: DataConfig, whole: dict[str, bytes], console: Console):
    shutil.rmtree(Path(config.directory, "shards"))
    prepare(config, console, workers=2)
    assert tree(config.directory) == whole


def test_a_shard_with_a_wrong_bit_is_made_again(config: DataConfig, whole: dict[str, bytes], console: Console):
    """With --verify the command finds every shard of the right size with another hash."""
    damaged = [*(file for file in shards(config) if file.parent.name == "000002"), shards(config)[-1]]
    for file in damaged:
        flip(file)
    with pytest.raises(ValueError, match=rf"{damaged[0]}: SHA-256 is .*; run `longring prepare RECIPE --verify`"):
        list(open_prepared(config.directory).verify())
    prepare(config, console, workers=1)
    assert tree(config.directory) != whole
    for _ in range(2):
        prepare(config, console, workers=1, verify=True)
        list(open_prepared(config.directory).verify())
        assert tree(config.directory) == whole


def reverse(file: Path) -> None:
    """Reverse the lines: shards made from them have the same sizes and numbers of sequences."""
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))


@pytest.mark.parametrize("change", [lambda file: file.write_text('{"text": "another"}\n'), Path.unlink, reverse])
def test_changed_sources_are_named_and_either_way_out_works(
    config: DataConfig, whole: dict[str, bytes], console: Console, change: Callable
):
    source = Path(config.source.path, "3.jsonl")
    before = source.read_bytes()
    change(source)
    damaged = next(file for file in shards(config) if file.parent.name == "000003")
    damaged.unlink()
    for _ in range(2):
        with pytest.raises(ValueError, match="their sources are not the ones they were made from") as error:
            prepare(config, console, workers=1)
        assert f"bring the sources back, or delete {config.directory}, and run `longring prepare" in str(error.value)
    source.write_bytes(before)
    prepare(config, console, workers=1)
    assert tree(config.directory) == whole, "the sources are back"
    change(source)
    shutil.rmtree(config.directory)
    prepare(config, console, workers=1)
    list(open_prepared(config.directory).verify())


CHILD = """
import json, sys
from rich.console import Console
from longring.data.config import DataConfig, SourceConfig, TokenizerConfig
from longring.data.prepare.prepare import prepare
tree = json.loads(sys.argv[1])
tree["source"], tree["tokenizer"] = SourceConfig(**tree["source"]), TokenizerConfig(**tree["tokenizer"])
if __name__ == "__main__":
    prepare(DataConfig(**tree), Console(quiet=True), workers=1)
"""


def test_a_repair_that_is_killed_is_continued(
    config: DataConfig, whole: dict[str, bytes], tmp_path: Path, console: Console
):
    shutil.rmtree(Path(config.directory, "shards"))
    (tmp_path / "child.py").write_text(CHILD)
    command = [sys.executable, "-P", str(tmp_path / "child.py"), json.dumps(asdict(config))]
    child = subprocess.Popen(command, start_new_session=True)
    ledgers = Path(f"{config.directory}.partial", "work", "ledgers")
    while len(list(ledgers.glob("*.json"))) < 2:
        assert child.poll() is None
        time.sleep(0.001)
    os.killpg(child.pid, signal.SIGKILL)  # its worker processes too
    assert child.wait() == -signal.SIGKILL
    prepare(config, console, workers=1)
    assert tree(config.directory) == whole
    assert not Path(f"{config.directory}.partial").exists()


@pytest.mark.parametrize("name", ["manifest.json", "shards.npy", "tokenizer.json", "unigram.npy", "inputs.jsonl"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_manifest_or_file_beside_it_says_what_to_delete(
    config: DataConfig, whole: dict[str, bytes], console: Console, name: str, damage: str
):
    file = Path(config.directory, name)
    file.write_bytes(file.read_bytes()[:-40]) if damage == "truncated" else file.unlink()
    advice = f"delete {config.directory} and run `longring prepare RECIPE`"
    if (name, damage) == ("manifest.json", "missing"):
        advice = "delete this one if nothing in it is needed"
    with pytest.raises(ValueError, match=r"manifest|damaged|missing") as error:
        open_prepared(config.directory)
    assert advice in str(error.value)
    assert "longring order" not in str(error.value)
    with pytest.raises(ValueError, match=r"data\.directory|manifest|damaged|missing") as error:
        prepare(config, console, workers=1)
    assert advice in str(error.value)
    shutil.rmtree(config.directory)
    prepare(config, console, workers=1)
    assert tree(config.directory) == whole


@pytest.mark.full
def test_a_manifest_of_other_data_than_its_settings_make(config: DataConfig, whole: dict[str, bytes], console: Console):
    manifest = open_prepared(config.directory)
    replace(manifest, has_boundaries=True).write(Path(config.directory))
    advice = f"delete {config.directory} and run `longring prepare RECIPE`"
    with pytest.raises(ValueError, match=f"has_boundaries = True, and these settings make False; {advice}"):
        prepare(config, console, workers=1)
    shutil.rmtree(config.directory)
    prepare(config, console, workers=1)
    assert tree(config.directory) == whole


def test_a_part_of_an_array_names_the_command_that_repairs(
    config: DataConfig, whole: dict[str, bytes], console: Console
):
    shards(config)[0].unlink()
    with pytest.raises(ValueError, match="run `longring prepare RECIPE`, which makes it again"):
        prepare_part(config, console, 0, 2)
    prepare(config, console, workers=1)
    prepare_part(config, console, 0, 2)
    assert tree(config.directory) == whole


@pytest.mark.full
def test_other_settings_have_three_ways_out(config: DataConfig, whole: dict[str, bytes], console: Console):
    other = replace(config, max_bucket_tokens=16)
    with pytest.raises(ValueError, match="set it back, name another data.directory, or delete") as error:
        prepare(other, console, workers=1)
    assert f"delete {config.directory} and run `longring prepare RECIPE`" in str(error.value)
    prepare(replace(other, max_bucket_tokens=32), console, workers=1)
    prepare(replace(other, directory=f"{config.directory}2"), console, workers=1)
    shutil.rmtree(config.directory)
    prepare(other, console, workers=1)
    assert tree(config.directory) == tree(f"{config.directory}2") != whole


def remote_copy(directory: str) -> str:
    address = f"memory://{uuid.uuid4().hex}"
    for name, content in tree(directory).items():
        fsspec.filesystem("memory").pipe(f"{address}/{name}", content)
    return address


def read_all(address: str, cache: Path) -> list[list]:
    manifest = open_prepared(address, LoaderConfig(cache_directory=str(cache)))
    list(manifest.verify())
    return [manifest.reader(one).read(range(one.sequences)).tolist() for one in manifest.buckets("train")]


@pytest.mark.parametrize("damage", [flip, lambda file: file.write_bytes(file.read_bytes()[:-512]), Path.unlink])
def test_a_damaged_cached_file_is_fetched_again(
    config: DataConfig, whole: dict[str, bytes], tmp_path: Path, damage: Callable
):
    address, cache = remote_copy(config.directory), tmp_path / "cache"
    before = read_all(address, cache)
    cached = [file for file in cache.rglob("*") if file.is_file() and file.stat().st_size > 4_000]
    assert len(cached) > 5
    for file in cached:
        damage(file)
    assert read_all(address, cache) == before


def test_a_truncated_cached_shard_is_fetched_again_when_it_is_read(
    config: DataConfig, whole: dict[str, bytes], tmp_path: Path
):
    address, cache = remote_copy(config.directory), tmp_path / "cache"
    manifest = open_prepared(address, LoaderConfig(cache_directory=str(cache)))
    bucket = manifest.buckets("train")[-1]
    before = manifest.reader(bucket).read(range(bucket.sequences)).tolist()
    for file in cache.rglob("*.tar"):
        file.write_bytes(file.read_bytes()[:-512])
    assert manifest.reader(bucket).read(range(bucket.sequences)).tolist() == before


def test_cached_shards_of_older_data_are_not_taken_for_new_ones(
    config: DataConfig, whole: dict[str, bytes], tmp_path: Path, console: Console
):
    """The data at an address is replaced by data of the same sizes in another order."""
    address, cache = remote_copy(config.directory), tmp_path / "cache"
    before = read_all(address, cache)
    other = replace(config, seed=5, directory=f"{config.directory}2")
    prepare(other, console, workers=1)
    for name, content in tree(other.directory).items():
        fsspec.filesystem("memory").pipe(f"{address}/{name}", content)
    after = read_all(address, cache)
    assert after != before
    assert after == read_all(remote_copy(other.directory), tmp_path / "cache2")


@pytest.mark.parametrize("name", ["manifest.json", "shards.npy", "shards/000001/train-L0000032-000000.tar"])
@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_a_damaged_remote_file_is_copied_there_again(
    config: DataConfig, whole: dict[str, bytes], tmp_path: Path, name: str, damage: str
):
    address, cache = remote_copy(config.directory), tmp_path / "cache"
    files = fsspec.filesystem("memory")
    files.pipe(f"{address}/{name}", whole[name][:-100]) if damage == "altered" else files.rm(f"{address}/{name}")
    advice = "copy the file there again from where" if damage == "altered" else "copy the prepared directory there"
    if (name, damage) == ("manifest.json", "altered"):  # the manifest of a store has no hash beside it
        advice = f"copy the prepared directory to {address} again"
    with pytest.raises(ValueError, match=rf"{address}/{name}: .*; {advice}"):
        read_all(address, cache)
    files.pipe(f"{address}/{name}", whole[name])
    assert read_all(address, cache)


def test_the_hashes_of_the_shards_are_the_manifests(config: DataConfig, whole: dict[str, bytes], console: Console):
    shutil.rmtree(Path(config.directory, "shards", "000001"))
    manifest = prepare(config, console, workers=1)
    expected = {entry["sha256"].decode() for entry in manifest.shards}
    assert {sha256_of(file) for file in Path(config.directory).rglob("*.tar")} == expected
