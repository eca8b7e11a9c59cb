"""A file is whole or absent, whatever interrupts its writing, and on the disk before its name is."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from longring.data import files
from longring.data.files import read_patiently, sha256_of, sha256_of_json, write_text, write_whole
from longring.launch.config import load_recipe
from longring.launch.grids.choice import LayerKind
from longring.launch.grids.remembered import recall_grids, remember_grids
from longring.launch.metrics import keep_steps
from longring.launch.run_directory import RunDirectory
from longring.launch.weights.directory import keep_files
from longring.parallel.cp.grid import CpGrid

ROOT = Path(__file__).parents[2]


@pytest.fixture
def operations(monkeypatch):
    """Record the names of the files that are flushed and renamed, in order."""
    seen: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def watched_fsync(descriptor):
        seen.append(f"flush {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        return fsync(descriptor)

    def watched_rename(self, target):
        seen.append(f"rename {Path(target).name}")
        return rename(self, target)

    monkeypatch.setattr(files.os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    return seen


def test_content_is_flushed_before_the_rename_and_the_directory_after_it(tmp_path, operations):
    write_text(tmp_path / "state.json", "{}")
    assert operations == [f"flush .{os.getpid()}.state.json", "rename state.json", f"flush {tmp_path.name}"]


@pytest.mark.parametrize("failing", ["write", "fsync", "rename"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    file = tmp_path / "state.json"
    write_text(file, "old")

    def fail(*_):
        raise OSError("No space left on device")

    def write(begun: Path) -> None:
        begun.write_text("half of the ne")
        if failing == "write":
            fail()

    if failing == "fsync":
        monkeypatch.setattr(files.os, "fsync", fail)
    elif failing == "rename":
        monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, write)
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_what_a_run_rewrites_is_safe_against_power_loss(tmp_path, operations):
    """Each file's content is flushed under another name before it gets its own, and its directory after it."""
    run = RunDirectory(tmp_path)
    run.create(load_recipe(ROOT / "launch" / "recipes" / "demo.toml"))
    remember_grids(run.grids_file, "2 ranks", {LayerKind(512, None): CpGrid(query=2)})
    run.metrics_file.write_text('{"step": 1}\n{"step": 2}\n')
    keep_steps(run.metrics_file, 1)
    for name in ("recipe.json", "grids.json", "metrics.jsonl"):
        at = operations.index(f"rename {name}")
        assert operations[at - 1 : at + 2] == [
            f"flush .{os.getpid()}.{name}",
            f"rename {name}",
            f"flush {tmp_path.name}",
        ]
    assert recall_grids(run.grids_file, "2 ranks") == {LayerKind(512, None): CpGrid(query=2)}
    assert [json.loads(line)["step"] for line in run.metrics_file.read_text().splitlines()] == [1]


def test_files_of_a_published_model_are_copied_whole(tmp_path, operations):
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "README.txt"):
        (tmp_path / "model" / name).write_text(name)
    keep_files(tmp_path / "model", tmp_path / "export")
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["config.json", "tokenizer.json"]
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "export" / name).read_text() == name
        at = operations.index(f"rename {name}")
        assert operations[at - 1 : at + 2] == [f"flush .{os.getpid()}.{name}", f"rename {name}", "flush export"]


def test_hashes_are_those_of_the_content(tmp_path):
    file = tmp_path / "abc"
    file.write_bytes(b"abc")
    assert sha256_of(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert sha256_of_json({"a": 1, "b": [2]}) == sha256_of_json(json.loads('{"b":  [2],\n "a": 1}'))
    assert sha256_of_json({"a": 1}) != sha256_of_json({"a": 2})


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_what_cannot_be_read_is_tried_again(monkeypatch: pytest.MonkeyPatch, number: int):
    pauses: list[float] = []
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    failures = [OSError(number, os.strerror(number))] * 3

    def read() -> str:
        if failures:
            raise failures.pop()
        return "content"

    assert read_patiently("name", read) == "content"
    assert pauses == [1, 2, 4]
    failures += [OSError(number, os.strerror(number))] * 4
    with pytest.raises(
        OSError, match=rf"^name: cannot be read after 4 attempts .*{os.strerror(number)}.*; start again"
    ):
        read_patiently("name", read)


def test_what_is_not_there_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files.time, "sleep", lambda _: pytest.fail("waited"))
    with pytest.raises(FileNotFoundError):
        read_patiently("name", (tmp_path / "none").read_bytes)
