"""Work of rank 0 alone: its result, and its error, are those of every rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch.distributed as dist
from longring.launch.errors import DamageError
from longring.launch.evaluation.in_training import EvaluationsInTraining
from longring.launch.together import on_rank_0

ERRORS = (PermissionError("no entry"), ValueError("no number"), DamageError("no hash"))


def results() -> list[Any]:
    """Return what work of rank 0 gives this rank: its value first, and then its errors."""
    mesh: Any = SimpleNamespace(rank=dist.get_rank(), world_size=dist.get_world_size())
    found: list[Any] = [on_rank_0(mesh, lambda: f"of rank {mesh.rank}")]

    def fail(error: Exception) -> None:
        raise error

    for error in ERRORS:
        try:
            on_rank_0(mesh, lambda error=error: fail(error))
        except Exception as raised:
            found.append((type(raised).__name__, str(raised)))
    return found


def test_the_result_and_the_error_of_rank_0_are_those_of_all(on_ranks):
    expected = ["of rank 0", ("CommonError", "no entry"), ("ValueError", "no number"), ("DamageError", "no hash")]
    assert on_ranks(2, results) == [expected] * 2


def owed(records: list[int] | None) -> bool | str:
    """Return whether step 4 is owed an evaluation; the records are those of rank 0, None: they cannot be read."""

    def evaluations() -> list[dict[str, int]]:
        assert dist.get_rank() == 0, "only rank 0 reads them"
        if records is None:
            raise OSError("evaluations.jsonl: cannot be read")
        return [{"step": step} for step in records]

    mesh = SimpleNamespace(rank=dist.get_rank(), world_size=dist.get_world_size())
    recipe = SimpleNamespace(train=SimpleNamespace(evaluate_every_steps=2))
    run = SimpleNamespace(evaluations=evaluations)
    unused = cast(Any, None)
    of_run = EvaluationsInTraining(
        cast(Any, recipe), cast(Any, run), unused, cast(Any, mesh), unused, unused, unused, unused
    )
    assert not of_run.are_owed(3), "none is due"
    try:
        return of_run.are_owed(4)
    except OSError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("records", "expected"),
    [([2, 4], False), ([2], True), (None, "CommonError: evaluations.jsonl: cannot be read")],
    ids=["recorded", "owed", "unreadable"],
)
def test_all_ranks_learn_from_rank_0_whether_an_evaluation_is_owed(on_ranks, records, expected):
    assert on_ranks(2, owed, records) == [expected] * 2
