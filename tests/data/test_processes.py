"""A process ends with its parent, also if the parent has ended before the process could say so."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from longring.data.processes import process_pool

CHILD = """
import os, signal, sys, time
from longring.data.processes import end_with_parent
{wait}
end_with_parent(int(sys.argv[1]), signal.{stop})
print("ready", flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())])
{wait}
os.kill(os.getpid(), 9)
"""
ORPHANED = "while os.getppid() == int(sys.argv[1]): time.sleep(0.01)"


@pytest.mark.parametrize("stop", ["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
def test_a_child_ends_when_its_parent_is_killed(before, stop):
    """The parent is killed after the child's call, or before it. The pipe closes when both have ended."""
    child = CHILD.format(wait=ORPHANED if before else "", stop=stop)
    # The child prints "ready" into the parent's output, which the parent cannot see: the test kills it then.
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(wait="" if before else "time.sleep(3600)"), child],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    if not before:
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
    parent.communicate(timeout=30)
    assert parent.returncode == -signal.SIGKILL


POOL = """
import time
from longring.data.processes import process_pool
def work(number):
    print("ready", flush=True)
    time.sleep(3600)
if __name__ == "__main__":
    with process_pool(2) as pool:
        for task in [pool.submit(work, number) for number in range(4)]:
            task.result()
"""


def test_a_pool_ends_when_its_process_is_killed(tmp_path: Path):
    (tmp_path / "pool.py").write_text(POOL)
    parent = subprocess.Popen([sys.executable, "-P", str(tmp_path / "pool.py")], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert [parent.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    parent.kill()
    parent.communicate(timeout=60)  # the pipe closes when all have ended


def test_an_error_ends_a_pool_at_once():
    def run() -> None:
        with process_pool(2) as pool:
            pool.submit(time.sleep, 3600)
            pool.submit(divmod, 1, 0).result()

    with pytest.raises(ZeroDivisionError):
        run()
