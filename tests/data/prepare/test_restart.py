"""Interrupted preparations: killed, out of disk space, or continued with other settings."""

import errno
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from helpers.died import Died, die_after
from helpers.files import tree
from helpers.lanes import by_lane
from longring.data.config import DataConfig
from longring.data.format import shards
from longring.data.format.manifest import open_prepared
from longring.data.prepare import input_shard, merge
from longring.data.prepare.prepare import prepare
from rich.console import Console

MakeConfig = Callable[..., DataConfig]
Words = Callable[..., str]

# The program of a separate process, which prepares the data of the settings in its first argument.
CHILD = """
import json, sys
from rich.console import Console
from longring.data.config import DataConfig, SourceConfig, TokenizerConfig
from longring.data.prepare.prepare import prepare
tree = json.loads(sys.argv[1])
tree["source"], tree["tokenizer"] = SourceConfig(**tree["source"]), TokenizerConfig(**tree["tokenizer"])
if __name__ == "__main__":
    prepare(DataConfig(**tree), Console(quiet=True), workers=2)
"""


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("seed", by_lane([0, 1], quick=[], slow=[1]))
def test_killed_at_any_point_and_continued_gives_the_same_bytes(config: DataConfig, tmp_path: Path, seed: int):
    reference = replace(config, directory=str(tmp_path / "reference"))
    prepare(reference, Console(quiet=True), workers=1)
    (tmp_path / "child.py").write_text(CHILD)
    command = [sys.executable, "-P", str(tmp_path / "child.py"), json.dumps(asdict(config))]
    ledgers, choose = tmp_path / "prepared.partial" / "work" / "ledgers", random.Random(seed)
    # Kill the process while it starts, then shortly after each of three random numbers of input shards is done.
    for target in [0, *sorted(choose.sample(range(1, 10), 3))]:
        child = subprocess.Popen(command, start_new_session=True)
        while len(list(ledgers.glob("*.json"))) < target:
            assert child.poll() is None
            time.sleep(0.001)
        time.sleep(choose.uniform(0, 0.02) if target else 0.3)
        os.killpg(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert not Path(config.directory).exists()
    subprocess.run(command, check=True)
    assert tree(config.directory) == tree(tmp_path / "reference")
    assert entries(tmp_path) == ["child.py", "corpus", "prepared", "reference"]


@pytest.mark.parametrize("point", by_lane(range(14), quick=[0, 6]))
def test_stopped_before_any_rename_and_continued(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: int
):
    """A preparation stopped before a rename or removal, the only steps that others see, continues to the same bytes."""
    config = replace(config, input_shard_bytes=2**28)
    reference = replace(config, directory=str(tmp_path / "reference"))
    prepare(reference, Console(quiet=True), workers=1)
    with monkeypatch.context() as patch:
        die_after(point, patch)
        try:
            prepare(config, Console(quiet=True), workers=1)
        except Died:
            assert not Path(config.directory).exists()
    if not Path(config.directory).exists():
        prepare(config, Console(quiet=True), workers=1)
    assert tree(config.directory) == tree(tmp_path / "reference")


def test_what_is_done_is_not_done_again(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken = tmp_path / "corpus" / "07.jsonl"
    good = broken.read_text()
    broken.write_text("x" * len(good))
    config = replace(config, max_bad_fraction=0.0)
    with pytest.raises(
        ValueError, match=r"1 of 1 records of source 'documents' are bad \(1 broken_json\).*07\.jsonl:1"
    ):
        prepare(config, Console(quiet=True), workers=1)
    assert not Path(config.directory).exists()
    partial = tmp_path / "prepared.partial"
    assert len(list((partial / "work" / "ledgers").iterdir())) == 7
    broken.write_text(good)
    done: list[int] = []
    run = input_shard._InputShardWriter.run
    monkeypatch.setattr(
        input_shard._InputShardWriter, "run", lambda self, file: done.append(int(file.name)) or run(self, file)
    )
    prepare(config, Console(quiet=True), workers=1)
    assert done == [7, 8, 9, 10, 11]
    assert entries(tmp_path) == ["corpus", "prepared"]


@pytest.mark.parametrize("way", by_lane(["bring back", "delete"], quick=["bring back"]))
def test_begun_with_other_settings_or_files(config: DataConfig, tmp_path: Path, way: str):
    broken = tmp_path / "corpus" / "07.jsonl"
    good = broken.read_text()
    broken.write_text("x" * len(good))
    config = replace(config, max_bad_fraction=0.0)
    with pytest.raises(ValueError, match="1 of 1 records of source .documents. are bad"):
        prepare(config, Console(quiet=True), workers=1)
    with pytest.raises(
        ValueError, match=r"data\.seed = 1: .*prepared\.partial is a preparation begun with 0; set it back"
    ):
        prepare(replace(config, seed=1), Console(quiet=True), workers=1)
    broken.write_text('{"text": "mended"}\n')
    advice = r"bring the files back to continue, or delete (\S+) and run `longring prepare RECIPE`"
    with pytest.raises(ValueError, match=f"begun with other files or file sizes; {advice}") as error:
        prepare(config, Console(quiet=True), workers=1)
    found = re.search(advice, str(error.value))
    assert found is not None
    broken.write_text(good) if way == "bring back" else shutil.rmtree(found[1])
    assert prepare(config, Console(quiet=True), workers=1).ledger.records == (360 if way == "bring back" else 331)


def test_a_merge_names_what_is_missing(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_manifest(*_) -> None:
        raise Died

    monkeypatch.setattr(merge, "_write_manifest", no_manifest)
    with pytest.raises(Died):
        prepare(config, Console(quiet=True), workers=1)
    monkeypatch.undo()
    partial = tmp_path / "prepared.partial"
    for number in (3, 9):
        merge.ledger_file(partial, number).unlink()
    with pytest.raises(ValueError, match=r"input shards 3, 9 of 12 are not prepared; run `longring prepare RECIPE`"):
        merge.merge(config, partial)
    prepare(config, Console(quiet=True), workers=1)
    list(open_prepared(config.directory).verify())


@pytest.fixture
def old(config: DataConfig, tmp_path: Path) -> DataConfig:
    """Return the settings of finished data from up to 40 documents of each source, in another directory."""
    old = replace(config, directory=str(tmp_path / "old"), source=replace(config.source, limit_documents=40))
    prepare(old, Console(quiet=True))
    return old


@pytest.fixture
def full_disk():
    """Make the system refuse to grow any file beyond 40,000 bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_leaves_old_data_good(
    config: DataConfig, old: DataConfig, tmp_path: Path, request: pytest.FixtureRequest
):
    before = tree(tmp_path / "old")
    request.getfixturevalue("full_disk")
    with pytest.raises(OSError, match="File too large"):
        prepare(replace(config, shard_tokens=2**20, input_shard_bytes=2**28), Console(quiet=True), workers=1)
    assert entries(tmp_path) == ["corpus", "old"]
    assert tree(tmp_path / "old") == before


def test_a_disk_that_fills_up_later_keeps_what_is_done(
    config: DataConfig, old: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    before, left, add = tree(tmp_path / "old"), 60, shards._add

    def no_space(*arguments) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return add(*arguments)

    monkeypatch.setattr(shards, "_add", no_space)
    with pytest.raises(OSError, match="No space left on device"):
        prepare(config, Console(quiet=True), workers=1)
    monkeypatch.undo()
    assert tree(tmp_path / "old") == before
    partial = tmp_path / "prepared.partial"
    done = len(list((partial / "work" / "ledgers").iterdir()))
    assert 0 < done < 12
    assert len(list((partial / "shards").iterdir())) == done, "nothing half-written is left"
    prepare(config, Console(quiet=True), workers=1)
    list(open_prepared(config.directory).verify())


def test_what_dead_processes_left_is_removed(config: DataConfig, tmp_path: Path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    work, host = tmp_path / "prepared.partial" / "work", socket.gethostname()
    dead, alive = work / f"000003.{host}.{child.pid}", work / f"000003.{host}.{os.getppid()}"
    for folder in (dead, alive):
        folder.mkdir(parents=True)
    shard = input_shard.InputShard(source="documents", files=(str(tmp_path / "corpus" / "03.jsonl"),))
    shutil.copy(config.tokenizer.path, tmp_path / "prepared.partial" / "tokenizer.json")
    input_shard.prepare_input_shard(config, tmp_path / "prepared.partial", 3, shard)
    assert not dead.exists()
    assert alive.exists()


def test_configuration_survives_the_trip_to_another_process(config: DataConfig):
    assert pickle.loads(pickle.dumps(config)) == config
