"""A directory that appears with all its content: whose unfinished files are kept, removed or in the way."""

from __future__ import annotations

from pathlib import Path

import pytest
from longring.data.lock import HeldError, held
from longring.launch.weights import new_directory as module
from longring.launch.weights.new_directory import LOCK, new_directory


def test_unfinished_files_belong_to_the_command_that_writes_them(tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    partial.mkdir()
    (partial / "notes").touch()
    with (
        pytest.raises(ValueError, match=r"out.partial: is needed for unfinished files and .*; move it away"),
        new_directory(out),
    ):
        pass
    assert (partial / "notes").exists()
    partial.rename(tmp_path / "moved")
    partial.mkdir()  # as a full disk leaves it
    with new_directory(out) as mine:
        (mine / "a").touch()
        with (
            pytest.raises(ValueError, match="out: is being written by process .*; wait for its end, or name another"),
            new_directory(out),
        ):
            pass
    assert {path.name for path in out.iterdir()} == {"a"}
    assert not partial.exists()
    # What a command that was ended has left is removed by the next one.
    partial.mkdir()
    for name in (LOCK, "old"):
        (partial / name).touch()
    (partial / "checkpoints" / "x").mkdir(parents=True)
    (out / "a").unlink()
    with new_directory(out) as mine:
        (mine / "b").touch()
    assert {path.name for path in out.iterdir()} == {"b"}


def test_unfinished_files_are_locked_until_they_have_their_name(tmp_path, monkeypatch):
    """Another command that had looked before would clear them."""
    out, steps = tmp_path / "out", []

    def sync_and_look(path: Path) -> None:
        partial = tmp_path / "out.partial"
        steps.append((path.name, partial.exists(), out.exists()))
        if partial.exists():
            with pytest.raises(HeldError), held(partial / LOCK):
                pass

    monkeypatch.setattr(module, "sync", sync_and_look)
    with new_directory(out) as mine:
        (mine / "a").touch()
    assert steps[0] == ("out.partial", True, False)
    assert [exists for _, *exists in steps[1:]] == [[False, True]] * len(steps[1:])
    assert {path.name for path in out.iterdir()} == {"a"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file/out", "file/out: Not a directory; name another directory, and give the same command again"),
        ("x" * 250, "File name too long; name another directory, and"),
        ("loop", "loop: has content; name a new directory"),
    ],
)
def test_a_name_that_no_directory_can_have_is_told_before_anything_is_written(tmp_path, name, message):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises((OSError, ValueError), match=message), new_directory(tmp_path / name):
        raise AssertionError("nothing is written")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "loop"}


def test_a_mount_point_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    with (
        pytest.raises(ValueError, match="is a mount point, which .*; name a directory inside"),
        new_directory(tmp_path),
    ):
        pass
    with new_directory(tmp_path / "inside"):
        pass
