"""The run directory: its lock, and what may be given beside its recipe."""

from __future__ import annotations

import subprocess
import sys

import pytest
from longring.launch import run_directory
from longring.launch.cli import main
from longring.launch.config import load_recipe
from longring.launch.run_directory import RunDirectory, find_run

HOLD = """
import sys, time
from longring.launch.run_directory import RunDirectory
with RunDirectory(sys.argv[1]).held():
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.full
def test_two_runs_in_one_directory_are_refused_until_the_first_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory, "_LOCK_WAIT_S", 0)
    run = RunDirectory(tmp_path / "run")
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"run_directory = {run.path}: in use by process {other.pid} on .* since"):
            run.held().__enter__()
    finally:
        other.kill()
        other.wait()
    with run.held():
        pass
    with run.held():
        assert run.lock_file.read_text().count("\n") == 1, "only the present holder is named"


def test_a_recipe_finds_its_run_and_an_override_another_one(recipe_file, tmp_path):
    run, rest = find_run(str(recipe_file), [f"run_directory={tmp_path}", "evaluate.knots=true"])
    assert (run.path, rest) == (tmp_path, ["evaluate.knots=true"])
    assert find_run(str(recipe_file))[0].path == recipe_file.parent / "run"
    assert find_run(str(tmp_path), rest)[1] == rest


@pytest.mark.parametrize("command", ["inspect", "checkpoints", "evaluate"])
def test_a_run_keeps_its_settings(recipe_file, tmp_path, command, capsys):
    """An override that would do nothing is refused; without it the command gets as far as the run's state lets it."""
    RunDirectory(tmp_path).create(load_recipe(recipe_file, [f"run_directory={tmp_path}"]))
    assert main([command, str(tmp_path), "train.steps=7"]) == 2
    refused = "override 'train.steps=7': only evaluate.* and parallel.* may differ from the run; leave it out"
    assert refused in capsys.readouterr().err
    status = main([command, str(tmp_path)])
    error = capsys.readouterr().err
    assert (status, error) == (0, "") or "no checkpoint yet" in error
