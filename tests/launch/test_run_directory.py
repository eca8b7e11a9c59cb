"""The lock of a run directory."""

from __future__ import annotations

import subprocess
import sys

import pytest
from longring.launch import run_directory
from longring.launch.run_directory import RunDirectory

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
