"""Files that cannot be read, written or found: a start ends or goes on, nothing is renamed, and no step is lost."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.faulty import Fault, Run
from helpers.ranks import variables_of
from helpers.sandbox import Sandbox
from helpers.small_checkpoint import make_checkpoint
from longring.data import files
from longring.data.files import sha256_of
from longring.launch import cli
from longring.launch.checkpoint import format as checkpoint_format
from longring.launch.checkpoint.format import (
    PARTIAL,
    complete_checkpoints,
    find_damage,
    last_good_checkpoint,
    publish_checkpoint,
    read_checkpoint_manifest,
)
from longring.launch.config import load_recipe
from longring.launch.errors import GO_ON_LATER, GPU_ERROR, IO_ERROR, USER_ERROR, DamageError
from longring.launch.metrics import MetricsWriter
from longring.launch.preflight import check_nothing_was_saved, preflight
from longring.launch.ranks.rank import as_rank
from longring.launch.records import append_record, put_bad_lines_aside, read_records
from longring.launch.run_directory import RunDirectory
from longring.launch.settings import to_tree
from longring.launch.trackers import TrackConfig, open_trackers
from longring.parallel.failures import PeerError
from rich.console import Console


@pytest.fixture
def sleepless(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that reading would have paused; no time passes."""
    pauses: list[float] = []
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    return pauses


def fail_to_open(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Let every file of this name fail to open with an error of the system."""
    opens = Path.open

    def opened(self, *arguments, **options):
        if self.name == name:
            raise OSError(number, os.strerror(number), str(self))
        return opens(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", opened)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOENT])
@pytest.mark.parametrize("name", ["manifest.json", "rank-00001.safetensors"])
def test_a_file_that_cannot_be_read_is_not_damaged(tmp_path, monkeypatch, sleepless, name, number):
    """ENOENT of a file that a listing shows is a name that a network file system has lost for a while."""
    make_checkpoint(tmp_path, 5)
    path = make_checkpoint(tmp_path, 7)
    whole = read_checkpoint_manifest(path)
    fail_to_open(monkeypatch, name, number)
    with pytest.raises(OSError, match=f"{path / name}: cannot be read after 4 attempts"):
        find_damage(path, whole) if name != "manifest.json" else read_checkpoint_manifest(path)
    assert sleepless == [1, 2, 4]
    if name == "manifest.json":
        with pytest.raises(OSError, match="cannot be read"):
            last_good_checkpoint(tmp_path)


def read_all(recipe_file: Path) -> None:
    """Read all files of prepared data but its shards, as a start, an evaluation and an inspection do."""
    manifest = preflight(load_recipe(recipe_file), 1).manifest
    manifest.tokenizer()
    manifest.unigram()
    manifest.inputs()


@pytest.mark.parametrize("name", ["manifest.json", "shards.npy", "tokenizer.json", "unigram.npy", "inputs.jsonl"])
def test_each_reading_of_prepared_data_is_tried_again(recipe_file, monkeypatch, sleepless, name):
    """The file can be opened every fourth time, then never, then always."""
    opens, tried = Path.open, []

    def opened(self, *arguments, **options):
        if self.name == name:
            tried.append(self)
            if len(tried) % 4:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return opens(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", opened)
    read_all(recipe_file)
    assert len(tried) >= 8, "hashed and read"
    fail_to_open(monkeypatch, name, errno.EIO)
    for _ in range(2):
        with pytest.raises(OSError, match=f"/{name}: cannot be read after 4 attempts .*; start again"):
            read_all(recipe_file)
    monkeypatch.undo()
    read_all(recipe_file)


def test_a_file_is_missing_only_if_its_directory_says_so(tmp_path, sleepless):
    path = make_checkpoint(tmp_path, 7)
    whole = read_checkpoint_manifest(path)
    (path / "rank-00001.safetensors").unlink()
    assert find_damage(path, whole) == f"{path}/rank-00001.safetensors: missing"
    (path / "manifest.json").unlink()
    with pytest.raises(DamageError, match="manifest.json: missing"):
        read_checkpoint_manifest(path)
    shutil.rmtree(path)  # its disk is gone
    with pytest.raises(OSError, match="manifest.json: cannot be read"):
        read_checkpoint_manifest(path)


def test_a_directory_that_cannot_be_listed_is_not_empty(tmp_path, monkeypatch, sleepless):
    make_checkpoint(tmp_path, 7)

    def fail(_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(OSError, match=f"{tmp_path}: cannot be read"):
        complete_checkpoints(tmp_path)


def test_a_command_that_cannot_read_ends_with_74(recipe_file, tmp_path, capsys, monkeypatch, sleepless):
    sandbox = Sandbox(recipe_file, tmp_path, capsys)
    sandbox.begin()
    make_checkpoint(
        sandbox.run.checkpoints, 5, data=sha256_of(sandbox.data / "manifest.json"), recipe=to_tree(sandbox.load())
    )
    path = make_checkpoint(
        sandbox.run.checkpoints, 7, data=sha256_of(sandbox.data / "manifest.json"), recipe=to_tree(sandbox.load())
    )
    fail_to_open(monkeypatch, "rank-00001.safetensors", errno.EIO)
    arguments = ["checkpoints", str(sandbox.run.path), "--verify", "--prune", "--keep-last", "1"]
    assert cli.main(arguments) == 1
    listed = capsys.readouterr().out
    assert listed.count(" unreadable") == 2
    assert f"unreadable: {path}/rank-00001.safetensors: cannot be read after 4 attempts" in listed
    assert len(complete_checkpoints(sandbox.run.checkpoints)) == 2, "what cannot be read is not deleted"
    manifest = path / "manifest.json"
    manifest.unlink()
    manifest.symlink_to(manifest)  # ELOOP
    train = ["train", str(sandbox.recipe), f"run_directory={sandbox.run.path}", "--ranks", "4"]
    for _ in range(2):
        assert cli.main(train) == IO_ERROR
        assert f"error: {manifest}: cannot be read after 4 attempts" in " ".join(capsys.readouterr().err.split())
    assert len(complete_checkpoints(sandbox.run.checkpoints)) == 2


@pytest.fixture(scope="module")
def begun(recipe_file, tmp_path_factory) -> Run:
    """A run that was stopped after step 8, with checkpoints of steps 3, 6 and 8."""
    run = Run(recipe_file, tmp_path_factory.mktemp("begun"))
    assert run.start(stop_after=8) == [0, 0]
    assert run.checkpoints == ["step-00000003", "step-00000006", "step-00000008"]
    return run


@pytest.mark.full
@pytest.mark.parametrize("after", [0, 1], ids=["hashing", "loading"])
def test_what_one_rank_cannot_read_ends_all_ranks_and_changes_nothing(begun, whole, tmp_path, after):
    """Rank 1 opens one file to hash it, and then the files of the ranges that it loads."""
    run = begun.copy(tmp_path)
    metrics = (run.path / "metrics.jsonl").read_text()
    for _ in range(2):
        assert run.start(Fault(1, f"unreadable 99 *.safetensors {after}")) == [IO_ERROR] * 2
        assert run.said.count("start again when its storage answers") == 1, "one rank speaks for all"
        assert re.search(
            r"step-00000008/rank-0000\d.safetensors: cannot be read after 4 attempts \(\[Errno 5", run.said
        )
        assert "Traceback" not in run.said
        assert run.checkpoints == begun.checkpoints
        assert (run.path / "metrics.jsonl").read_text() == metrics
    assert run.start(Fault(1, f"unreadable 3 *.safetensors {after}")) == [0, 0], (
        "what can be read the fourth time is read"
    )
    assert "resumed from" in run.said
    assert "step-00000008" in run.said
    run.finish(whole)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


@pytest.mark.full
def test_a_run_whose_checkpoints_are_damaged_or_gone_does_not_start_over(begun, whole, tmp_path):
    run = begun.copy(tmp_path)
    metrics = (run.path / "metrics.jsonl").read_text()
    checkpoints = run.path / "checkpoints"
    for name in begun.checkpoints:
        flip(checkpoints / name / "rank-00000.safetensors")
    for _ in range(2):
        assert run.start() == [USER_ERROR] * 2
        assert f"error: checkpoints {checkpoints}: all are damaged: " in run.said
        assert run.said.count("has SHA-256") == 3
    checkpoints.rename(tmp_path / "another disk")
    for _ in range(2):
        assert run.start() == [USER_ERROR] * 2
        assert "step 8 was saved, and" in run.said
        assert not checkpoints.exists()
    assert (run.path / "metrics.jsonl").read_text() == metrics
    shutil.copytree(begun.path / "checkpoints", checkpoints)  # the advice: a copy is brought back
    run.finish(whole)


@pytest.mark.full
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_over(recipe_file, whole, tmp_path):
    run = Run(recipe_file, tmp_path)
    assert run.start(Fault(1, "SIGKILL", step=3, operation="forward")) == [GO_ON_LATER, -9]
    assert len(run.metrics) == 2
    run.finish(whole)


@pytest.mark.full
def test_saves_that_are_not_published_leave_nothing_and_those_that_are_count(recipe_file, whole, tmp_path):
    """The rename of step 3 happens and is reported as failed, that of step 6 fails."""
    run = Run(recipe_file, tmp_path)
    faults = [Fault(0, "renamed *00000003.partial"), Fault(0, "unrenamed *00000006.partial")]
    assert run.start(*faults, stop_after=8) == [0, 0]
    assert [(event["event"], event["step"]) for event in run.events] == [("save failed", 6)]
    assert run.checkpoints == ["step-00000003", "step-00000008"]
    assert [save["step"] for save in read_records(run.path / "saves.jsonl")] == [3, 8]
    run.finish(whole)


@pytest.mark.full
def test_checkpoints_that_cannot_be_written_end_the_start_before_its_first_step(recipe_file, whole, tmp_path):
    run = Run(recipe_file, tmp_path)
    run.path.mkdir()
    (run.path / "logs").mkdir()
    checkpoints = run.path / "checkpoints"
    checkpoints.symlink_to("/sys/kernel")  # no file can be made there, whoever asks
    for _ in range(2):
        assert run.start() == [IO_ERROR] * 2
        assert run.said.count("error: ") == 1
        assert f"error: run_directory = {run.path}: {checkpoints} cannot be written: " in run.said
        assert not (run.path / "starts.jsonl").exists()
    checkpoints.unlink()
    run.finish(whole)


@pytest.mark.full
def test_a_run_directory_that_is_moved_away_ends_the_start(recipe_file, whole, tmp_path):
    run, there = Run(recipe_file, tmp_path), tmp_path / "there" / "run"
    there.parent.mkdir()
    statuses = run.start(Fault(0, f"move {run.path} {there}", step=7, operation="reading micro-batch 1"))
    assert statuses == [IO_ERROR, GO_ON_LATER]
    assert run.said.count("error: ") == 1
    assert f"error: step 7: cannot be recorded in {run.path}: No such file or directory; " in run.said
    assert "Traceback" not in run.said
    assert not run.path.exists(), "nothing is written where the directory was"
    run.path = there
    run.finish(whole)


@pytest.mark.full
def test_lines_that_are_no_records_are_put_aside(begun, whole, tmp_path):
    run = begun.copy(tmp_path)
    for name in ("metrics.jsonl", "starts.jsonl", "saves.jsonl"):
        lines = (run.path / name).read_bytes().splitlines(keepends=True)
        (run.path / name).write_bytes(b"".join([lines[0], b"\xff\xfe\n", b"7\n", *lines[1:], b'{"step": 9, "lo']))
    run.finish(whole)
    for name in ("metrics.jsonl", "starts.jsonl", "saves.jsonl"):
        assert (run.path / f"{name}.damaged").read_bytes() == b"\xff\xfe\n7\n"
    said = [event["message"] for event in run.events]
    assert f"{run.path}/metrics.jsonl: lines 2, 3 held no record: moved to metrics.jsonl.damaged" in said
    assert len(said) == 3
    assert [save["step"] for save in read_records(run.path / "saves.jsonl")] == [3, 6, 8, 9, 12]


@pytest.mark.full
def test_memory_that_one_rank_lacks_is_named_by_that_rank(recipe_file, whole, tmp_path):
    run = Run(recipe_file, tmp_path)
    assert run.start(Fault(1, "memory", step=5, operation="forward")) == [GO_ON_LATER, USER_ERROR]
    assert "error: rank 1: not enough memory: " in run.said
    assert "lower parallel.tokens_per_rank" in run.said
    assert "Traceback" not in run.said
    run.finish(whole)


def test_memory_is_recognized_in_each_of_its_errors(capsys, monkeypatch):
    for name, value in variables_of(3, 4, 29500).items():
        monkeypatch.setenv(name, value)

    def wrapped():
        try:
            raise MemoryError
        except MemoryError as error:
            raise OSError("rank 3 cannot read its rows") from error

    def raised(error: Exception):
        raise error

    allocator = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...\nException raised from ...")
    for work in (
        wrapped,
        lambda: raised(allocator),
        lambda: raised(MemoryError("Unable to allocate 8 GiB")),
        lambda: raised(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))),
    ):
        assert as_rank(work) == USER_ERROR
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: rank 3: not enough memory: ")
    with pytest.raises(RuntimeError, match="another"):
        as_rank(lambda: raised(RuntimeError("another")))


def test_an_error_of_a_gpu_and_a_dead_peer_have_statuses_of_their_own(capsys, monkeypatch):
    for name, value in variables_of(3, 4, 29500).items():
        monkeypatch.setenv(name, value)

    def ends(error: Exception) -> tuple[int, str]:
        def work():
            raise error

        return as_rank(work), capsys.readouterr().err

    status, said = ends(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    assert status == GPU_ERROR
    assert said == (
        "error: rank 3: its GPU reports: an illegal memory access was encountered; give the same command again, and "
        "exclude the machine if it happens there again\n"
    )
    status, said = ends(torch.AcceleratorError("CUDA error: out of memory"))
    assert status == USER_ERROR
    assert said.startswith("error: rank 3: not enough GPU memory: out of memory; lower parallel.tokens_per_rank")
    status, said = ends(PeerError("rank 1 of the group is gone or does not answer"))
    assert (status, said) == (GO_ON_LATER, "error: rank 1 of the group is gone or does not answer\n")
    status, said = ends(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:5\nraised"))
    assert status == GO_ON_LATER
    assert said == (
        "error: rank 3: cannot reach the other ranks: [gloo/transport/tcp/pair.cc:547] Connection closed by peer "
        "[10.0.0.1]:5; give the same command again\n"
    )


@pytest.fixture
def lost(recipe_file, tmp_path) -> RunDirectory:
    """A run with records of a save after step 6, whose only checkpoint has been taken away."""
    run = RunDirectory(tmp_path / "run")
    run.create(load_recipe(recipe_file, [f"run_directory={run.path}"]))
    run.record_save(6)
    return run


def test_a_run_that_has_saved_steps_is_not_started_over(lost, recipe_file, tmp_path):
    said = f"run_directory = {lost.path}: step 6 was saved, and {lost.checkpoints} has no complete checkpoint"
    advice = "; mount its disk or bring a copy back, or name another run_directory to start from the first step"
    with pytest.raises(ValueError, match=said + advice):
        check_nothing_was_saved(lost)
    recipe = load_recipe(recipe_file, [f"run_directory={lost.path}"])
    with pytest.raises(ValueError, match="step 6 was saved"):
        preflight(recipe, 4)
    assert preflight(load_recipe(recipe_file, [f"run_directory={tmp_path}/another"]), 4).steps_done == 0
    make_checkpoint(
        lost.checkpoints, 6, data=sha256_of(Path(recipe.data.directory, "manifest.json")), recipe=to_tree(recipe)
    )
    assert preflight(recipe, 4).steps_done == 6


@pytest.mark.parametrize("shown", ["starts.jsonl", "step-00000006.damaged"])
def test_other_records_of_saved_steps_count_as_well(tmp_path, shown):
    run = RunDirectory(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    append_record(run.starts_file, {"from_step": 0})
    append_record(run.metrics_file, {"step": 5})
    check_nothing_was_saved(run)
    if shown == "starts.jsonl":
        append_record(run.starts_file, {"from_step": 6})
    else:
        (run.checkpoints / shown).mkdir()
    with pytest.raises(ValueError, match="step 6 was saved|step-00000006.damaged was put aside"):
        check_nothing_was_saved(run)


def test_a_rename_that_failed_is_not_taken_for_one_that_happened(tmp_path, monkeypatch):
    final = make_checkpoint(tmp_path, 7)
    partial = Path(shutil.copytree(final, final.with_name(final.name + PARTIAL)))
    (partial / "manifest.json").write_text("another")
    with pytest.raises(OSError, match="not empty"):
        publish_checkpoint(partial)
    shutil.rmtree(final)

    def no_rename(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", no_rename)
        with pytest.raises(OSError, match="Input/output"):
            publish_checkpoint(partial)
    assert publish_checkpoint(partial) == final


def test_a_checkpoint_counts_once_it_is_renamed_and_a_flush_that_fails_is_no_failed_rename(
    tmp_path, monkeypatch, sleepless, caplog
):
    """The rename happens and is reported as failed; reading the manifest back succeeds the fourth time."""
    caplog.set_level(logging.WARNING)
    final = make_checkpoint(tmp_path, 7)
    renames, opens, opened = Path.rename, Path.open, []

    def renamed(self, target):
        renames(self, target)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def opens_late(self, *arguments, **options):
        if self == final / "manifest.json" and len(opened) < 3:
            opened.append(self)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return opens(self, *arguments, **options)

    partial = final.rename(final.with_name(final.name + PARTIAL))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", renamed)
        patch.setattr(Path, "open", opens_late)
        assert publish_checkpoint(partial) == final
    assert sleepless == [1, 2, 4]
    assert "reported as not renamed, and is there" in caplog.text

    def no_sync(path):
        if path == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    caplog.clear()
    partial = final.rename(final.with_name(final.name + PARTIAL))
    monkeypatch.setattr(checkpoint_format, "sync", no_sync)
    assert publish_checkpoint(partial) == final
    assert "not renamed" not in caplog.text
    assert f"{final}: is there, and its directory could not be flushed: " in caplog.text


def test_lines_without_a_record_are_kept_where_the_disk_is_full(tmp_path):
    file = tmp_path / "events.jsonl"
    content = b'{"event": "a"}\nno record\n{"event": "b"}\n'
    file.write_bytes(content)
    aside = file.with_name("events.jsonl.damaged")
    aside.symlink_to("/dev/full")
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            put_bad_lines_aside(file)
        assert file.read_bytes() == content, "no line is lost"
    aside.unlink()
    assert put_bad_lines_aside(file) == f"{file}: line 2 held no record: moved to events.jsonl.damaged"
    assert aside.read_bytes() == b"no record\n"
    assert put_bad_lines_aside(file) is None
    assert [record["event"] for record in read_records(file)] == ["a", "b"]


def test_records_are_appended_to_a_line_of_their_own(tmp_path):
    file = tmp_path / "events.jsonl"
    assert read_records(file) == []
    assert put_bad_lines_aside(file) is None
    file.write_bytes(b'{"event": "a"}\n{"event": "b", "mess')
    append_record(file, {"event": "c"})
    append_record(file, {"event": "d"})
    assert [record["event"] for record in read_records(file)] == ["a", "c", "d"]
    assert put_bad_lines_aside(file) == f"{file}: line 2 held no record: moved to events.jsonl.damaged"
    assert [json.loads(line)["event"] for line in file.read_text().splitlines()] == ["a", "c", "d"]
    file.write_bytes(file.read_bytes() + b'{"event": "torn')
    assert put_bad_lines_aside(file) is None, "a crash leaves a last line like this"
    assert [record["event"] for record in read_records(file)] == ["a", "c", "d"]


def test_a_picture_that_cannot_be_completed_hides_no_error(tmp_path, monkeypatch):
    """TensorBoard opens its file again to write the rest, and raises where the directory is gone."""
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    [board] = open_trackers(TrackConfig(), run.tensorboard, "1" * 32, 0, {})
    writer = MetricsWriter(run, [board], 0, 10, Console(quiet=True))
    monkeypatch.setattr(board, "close", lambda: (run.path / "none" / "file").open())
    writer.close()


def test_a_checkpoint_of_another_version_is_refused_and_kept(recipe_file, tmp_path, monkeypatch):
    path = make_checkpoint(tmp_path, 7)
    monkeypatch.setattr(checkpoint_format, "FORMAT", 99)
    with pytest.raises(ValueError, match="of another version of LongRing") as error:
        read_checkpoint_manifest(path)
    assert not isinstance(error.value, DamageError)
    with pytest.raises(ValueError, match="of another version of LongRing"):
        last_good_checkpoint(tmp_path)
