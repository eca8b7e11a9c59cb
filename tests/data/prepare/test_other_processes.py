"""Preparations at once, killed ones, and full disks: one line says what to do, and doing it gives the same bytes."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers.died import end_process
from helpers.files import tree
from helpers.lanes import by_lane
from longring.data.config import DataConfig, TokenizerConfig
from longring.data.format import shards
from longring.data.format.tokenizer_file import STUCK_STATUS
from longring.data.lock import held
from longring.data.order.stages import order
from longring.data.order_config import OrderConfig
from longring.data.prepare import merge
from longring.data.prepare import prepare as prepare_module
from longring.data.prepare.prepare import prepare
from rich.console import Console

QUIET = Console(quiet=True)

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


@pytest.fixture
def whole(config: DataConfig, tmp_path: Path) -> dict[str, bytes]:
    """Return the files of the data, prepared in another directory."""
    prepare(replace(config, directory=str(tmp_path / "reference")), QUIET, workers=1)
    return tree(tmp_path / "reference")


@pytest.fixture
def begun(config: DataConfig, tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Start a preparation with two worker processes; give it when an input shard is done."""
    (tmp_path / "child.py").write_text(CHILD)
    command = [sys.executable, "-P", str(tmp_path / "child.py"), json.dumps(asdict(config))]
    child = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE)
    while not list((tmp_path / "prepared.partial" / "work" / "ledgers").glob("*.json")):
        assert child.poll() is None
        time.sleep(0.001)
    yield child
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
    child.communicate(timeout=60)


def test_a_second_preparation_is_refused(config: DataConfig, whole: dict[str, bytes], begun: subprocess.Popen):
    os.killpg(begun.pid, signal.SIGSTOP)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"data\.directory = .*prepared: is being prepared by process") as error:
            prepare(config, QUIET, workers=1)
        assert f"process {begun.pid} on " in str(error.value)
        assert "; wait for it or end it, or name another one" in str(error.value)
    os.killpg(begun.pid, signal.SIGCONT)
    assert begun.wait(timeout=120) == 0
    prepare(config, QUIET, workers=1)
    assert tree(config.directory) == whole
    assert not Path(f"{config.directory}.lock").exists()


def test_a_killed_preparation_leaves_no_process(config: DataConfig, whole: dict[str, bytes], begun: subprocess.Popen):
    begun.kill()  # the process alone, not its group
    begun.communicate(timeout=60)  # its output is closed when its worker processes have ended too
    assert begun.returncode == -signal.SIGKILL
    prepare(config, QUIET, workers=1)
    assert tree(config.directory) == whole
    assert not Path(f"{config.directory}.lock").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a small file system in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a file system: run this test as root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # files that are mapped may still be open


@pytest.mark.parametrize("workers", by_lane([1, 2], quick=[1]))
def test_a_full_disk_is_named_and_with_room_the_bytes_are_the_same(
    config: DataConfig, whole: dict[str, bytes], small_disk: Path, workers: int
):
    there = replace(config, directory=str(small_disk / "prepared"))
    for _ in range(2):
        with pytest.raises(
            OSError, match=rf"{there.directory}\.partial: the disk is full .* bytes are free now.*; make"
        ):
            prepare(there, QUIET, workers=workers)
        assert not Path(there.directory).exists()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    prepare(there, QUIET, workers=workers)
    assert tree(there.directory) == whole


@pytest.mark.full
@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (STUCK_STATUS, ValueError, "ended; its error is above"),
        (9, OSError, "killed from outside, perhaps for memory"),
    ],
)
def test_the_end_of_a_process_is_told(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch, status: int, error: type[Exception], said: str
):
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "PrepareStep", lambda *_: partial(end_process, status))
        with pytest.raises(error, match=rf"prepared\.partial: a process of the preparation (has|was) {said}"):
            prepare(config, QUIET, workers=2)


STUCK = """
import json, sys
from rich.console import Console
from longring.data.config import DataConfig, SourceConfig, TokenizerConfig
from longring.data.format import tokenizer, tokenizer_file
from longring.data.prepare.prepare import prepare
tokenizer_file.MAX_ENCODE_SECONDS = tokenizer.MAX_ENCODE_SECONDS = 1
tree = json.loads(sys.argv[1])
tree["source"], tree["tokenizer"] = SourceConfig(**tree["source"]), TokenizerConfig(**tree["tokenizer"])
prepare(DataConfig(**tree), Console(quiet=True), workers=1)
"""


@pytest.mark.full
def test_a_document_that_does_not_end_is_named_and_its_advice_works(config: DataConfig, tmp_path: Path):
    """The tokenizer is quick on every text but a run of the letter q."""
    tokenizer = json.loads(Path(config.tokenizer.path).read_bytes())
    slow = {"type": "Split", "pattern": {"Regex": "q+(?![q!])"}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [slow, tokenizer["pre_tokenizer"]]}
    (tmp_path / "slow.json").write_text(json.dumps(tokenizer))
    config = replace(config, tokenizer=TokenizerConfig(path=str(tmp_path / "slow.json")))
    document = tmp_path / "corpus" / "03x.jsonl"
    document.write_text(json.dumps({"text": ("q" * 65_535 + "!") * 20}) + "\n")
    partial_directory = tmp_path / "prepared.partial"
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", STUCK, json.dumps(asdict(config))], stderr=subprocess.PIPE)
        assert done.returncode == STUCK_STATUS
        assert done.stderr.decode() == (
            f"error: {partial_directory}/tokenizer.json: has worked for 1 s on {document}:1, byte 0, or on a document "
            f"soon after it; delete {partial_directory}, then leave the document out or name another "
            "data.tokenizer.path\n"
        )
    shutil.rmtree(partial_directory)
    document.unlink()
    assert prepare(config, QUIET, workers=2).ledger.documents == 360


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError("96 requested and 0 written")


@pytest.mark.parametrize("error", FULL)
def test_every_error_of_a_full_disk_is_named(
    config: DataConfig, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, error: OSError
):
    def fail(*_: object, **__: object) -> None:
        raise error

    for module, name in ((shards, "_add"), (np, "save"), (merge, "write_text")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            with pytest.raises(OSError, match="the disk is full"):
                prepare(config, QUIET, workers=1)
    prepare(config, QUIET, workers=1)
    assert tree(config.directory) == whole


@pytest.fixture
def ordered(config: DataConfig, tmp_path: Path) -> OrderConfig:
    prepare(config, QUIET, workers=1)
    return OrderConfig(
        mode="in_context",
        directory=str(tmp_path / "ordered"),
        embedding_dimensions=8,
        neighbors=5,
        window_tokens=64,
    )


@pytest.mark.full
def test_a_second_ordering_is_refused(config: DataConfig, ordered: OrderConfig):
    said = rf"order\.work_directory = .*: is used by process {os.getpid()} on"
    with held(Path(f"{config.directory}.order", "lock")), pytest.raises(ValueError, match=said):
        order(config, ordered, QUIET, workers=1)
    assert order(config, ordered, QUIET, workers=1) is not None


@pytest.mark.slow
def test_a_full_disk_is_named_by_an_ordering(
    config: DataConfig, ordered: OrderConfig, tmp_path: Path, small_disk: Path
):
    order(config, ordered, QUIET, workers=1)
    there = replace(ordered, directory=str(small_disk / "ordered"), work_directory=str(small_disk / "work"))
    for _ in range(2):
        with pytest.raises(OSError, match=r"the disk is full .*; make room, and the same command continues"):
            order(config, there, QUIET, workers=1)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    order(config, there, QUIET, workers=1)
    assert tree(there.directory) == tree(tmp_path / "ordered")
