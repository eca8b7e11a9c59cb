"""A process ends with its parent, also if the parent has ended before the process could say so."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

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
