"""Whole runs whose rings send by copies: guards, steps, saves; equal to runs over gloo to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.faulty import Fault, Run, assert_equal
from longring.launch.errors import GO_ON_LATER

SPREAD = ["parallel.tokens_per_rank=256", "train.steps=6", "train.warmup_steps=2", "parallel.cp.schedule=token_ring"]


def of_copies(recipe_file: Path, directory: Path, *more: str) -> Run:
    return Run(recipe_file, directory, [*SPREAD, "parallel.cp.peer_copies=always", *more])


@pytest.mark.slow
def test_a_run_by_copies_equals_one_over_gloo(recipe_file, tmp_path):
    gloo, copies = Run(recipe_file, tmp_path / "gloo", SPREAD), of_copies(recipe_file, tmp_path / "copies")
    for run in (gloo, copies):
        assert run.start() == [0, 0], run.said
    assert copies.metrics == gloo.metrics
    assert_equal(copies.saved(), gloo.saved())
    log = (copies.path / "logs" / "rank-00000.log").read_text()
    assert "copies between the ranks of rings of up to 2: " in log


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", [Fault(1, "SIGKILL", step=4, operation="forward"), Fault(0, "SIGKILL", step=5, operation="forward")]
)
def test_a_killed_rank_ends_a_run_by_copies(recipe_file, tmp_path, fault):
    """The other rank is told at once, and the same command continues; nothing is left in shared memory."""
    before = {path.name for path in Path("/dev/shm").iterdir()}
    run = of_copies(recipe_file, tmp_path)
    statuses = run.start(fault)
    assert statuses[fault.rank] == -9
    assert statuses[1 - fault.rank] == GO_ON_LATER
    assert not {name for name in {path.name for path in Path("/dev/shm").iterdir()} - before if "longring" in name}
    run.finish()


@pytest.mark.slow
def test_a_hang_of_a_run_by_copies_is_ended_by_the_watchdog(recipe_file, tmp_path):
    run = of_copies(recipe_file, tmp_path, "faults.hang_minutes=0.05")
    statuses = run.start(Fault(1, "hang", step=4, operation="forward"))
    assert statuses == [GO_ON_LATER] * 2
    assert run.events[-1]["event"] == "hang"
    assert "rank 1 hangs at step 4, forward" in run.said
