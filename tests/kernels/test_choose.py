"""The choice of backends by measurement, with backends that are wrong, slow, or raise."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from longring.kernels import backends, choose
from longring.kernels.backends import BACKENDS, Backend, Selection
from longring.kernels.case import Kind, Task
from longring.kernels.choose import Question, Sample, Timing, fastest, measure, rehearse, select, tiles_of
from longring.kernels.layout import SeqLayout

CPU = torch.device("cpu")
WHOLE, PACKED = SeqLayout.contiguous(64), SeqLayout.packed((20, 44))
QUESTION = Question(
    4, 2, 16, torch.bfloat16,
    (
        Sample(2, WHOLE, WHOLE, None, ("forward", "backward")),
        Sample(1, WHOLE, WHOLE, 9, ("forward", "backward")),
        Sample(1, SeqLayout(((64, 96),)), WHOLE, None, ("continued", "backward")),
        Sample(1, PACKED, PACKED, None, ("continued", "backward")),
    ),
)  # fmt: skip
TILES = [
    ("forward", "causal"), ("backward", "causal"), ("forward", "window"), ("backward", "window"),
    ("continued", "whole"), ("backward", "whole"), ("continued", "documents"), ("backward", "documents"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch) -> Iterator[None]:
    """Small checked tiles, short times, and no kept choice."""
    monkeypatch.setattr(choose, "CHECKED_TOKENS", 101)
    monkeypatch.setattr(choose, "TIMED_S", 0.0)
    backends._choose.cache_clear()
    yield
    backends._choose.cache_clear()


def add(monkeypatch, name: str, change: Any = lambda task, result: None, **fields: Any) -> None:
    """Add a backend: the reference, with `change` called on each result, which may spoil it."""
    exact = BACKENDS["reference"]

    def forward(q, k, v, mask, scale, softcap, running):
        result = exact.forward(q, k, v, mask, scale, softcap, running)
        change("forward" if running is None else "continued", result)
        return result

    def backward(*given):
        exact.backward(*given)
        change("backward", given[-1])

    monkeypatch.setitem(BACKENDS, name, Backend(lambda case: None, forward, backward, **fields))


def test_a_backend_is_timed_for_each_task_and_kind_of_tile(monkeypatch):
    add(monkeypatch, "right")
    assert tiles_of(QUESTION, CPU) == {tile: [number // 2] for number, tile in enumerate(TILES)}
    timings = list(measure(QUESTION, "right", CPU))
    assert [(timing.task, timing.kind) for timing in timings] == TILES
    assert all(timing.seconds and not timing.note and timing.backend == "right" for timing in timings)
    assert fastest(timings) == dict.fromkeys(TILES, "right")
    add(monkeypatch, "some", kinds=("causal", "whole"))
    assert {timing.kind for timing in measure(QUESTION, "some", CPU)} == {"causal", "whole"}


def spoil(task: str, part: int, how: Any) -> Any:
    """Return a change of one tensor of a task's result."""
    return lambda done, result: how(result[part]) if done == task else None


@pytest.mark.parametrize(
    ("change", "task", "note"),
    [
        (spoil("forward", 0, lambda out: out.mul_(1.02)), "forward", "out differs"),
        (spoil("forward", 1, lambda lse: lse.add_(0.01)), "forward", "lse differs"),
        (spoil("continued", 0, lambda out: out[:, 3].zero_()), "continued", "out differs"),
        (spoil("continued", 0, lambda out: out[:, 3, 0, 0].fill_(torch.nan)), "continued", "out differs"),
        (spoil("backward", 0, lambda dq: dq[:, :, 0].neg_()), "backward", "dq differs"),
        (spoil("backward", 1, lambda dk: dk.mul_(1.02)), "backward", "dk differs"),
        (spoil("backward", 2, lambda dv: dv[:, 7].zero_()), "backward", "dv differs"),
    ],
)
def test_a_backend_with_a_wrong_result_does_not_count_for_its_task(monkeypatch, change, task, note):
    add(monkeypatch, "wrong", change)
    for timing in measure(QUESTION, "wrong", CPU):
        assert timing.note.startswith(note if timing.task == task else "")
        assert (timing.seconds is None) == (timing.task == task) == bool(timing.note)


def test_tiles_of_several_sequences_are_checked_with_two(monkeypatch):
    """A kernel may count keys or rows through the batch, and be right for one sequence."""
    add(monkeypatch, "wrong", spoil("forward", 0, lambda out: out[1:].zero_()))
    notes = {timing.kind: timing.note for timing in measure(QUESTION, "wrong", CPU) if timing.task == "forward"}
    assert notes.keys() == {"causal", "window"}
    assert notes["causal"].startswith("out differs") and not notes["window"], "two sequences, and one"


def test_rows_that_see_nothing_must_have_no_lse(monkeypatch):
    add(monkeypatch, "wrong", spoil("forward", 1, lambda lse: lse.masked_fill_(lse.isneginf(), torch.inf)))
    question = QUESTION._replace(samples=(Sample(1, PACKED, PACKED, None, ("forward",)),))
    [timing] = measure(question, "wrong", CPU)
    assert timing.note == "lse is not -inf for the queries that see no key"


def test_a_backend_that_raises_has_a_note_and_the_fastest_of_the_others_is_taken(monkeypatch):
    def fail(task: str, result: Any) -> None:
        if task == "backward":
            raise RuntimeError("no kernel image is available")

    add(monkeypatch, "failing", fail)
    add(monkeypatch, "slow", lambda task, result: time.sleep(0.01 if task == "forward" else 0.0))
    add(monkeypatch, "quick", lambda task, result: time.sleep(0.0 if task == "forward" else 0.01))
    question = QUESTION._replace(samples=QUESTION.samples[:1])
    timings = [timing for name in ("failing", "slow", "quick") for timing in measure(question, name, CPU)]
    notes = {(timing.backend, timing.task): timing.note for timing in timings}
    assert notes.pop(("failing", "backward")) == "RuntimeError: no kernel image is available"
    assert set(notes.values()) == {""}
    assert fastest(timings[2:]) == {("forward", "causal"): "quick", ("backward", "causal"): "slow"}
    assert fastest(timings[:2]) == {("forward", "causal"): "failing"}


def test_a_backend_that_fails_for_one_sample_of_a_kind_does_not_count_for_the_kind():
    def timings(name: str, *seconds: float | None) -> list[Timing]:
        return [Timing("forward", "causal", number, name, x, "") for number, x in enumerate(seconds)]

    tile = ("forward", "causal")
    assert fastest([*timings("a", 1.0, 4.0), *timings("b", 3.0, 1.0)]) == {tile: "b"}
    assert fastest([*timings("a", 1.0, 4.0), *timings("b", 3.0, None)]) == {tile: "a"}
    assert fastest(timings("b", 3.0, None)) == {}


def test_a_tile_without_a_right_backend_is_an_error_that_tells_what_each_check_said():
    tile: tuple[Task, Kind] = ("forward", "causal")
    wrong, failed, right = (
        Timing(*tile, 0, "triton", None, "out differs"),
        Timing(*tile, 0, "flash", None, "RuntimeError: no kernel"),
        Timing("backward", "causal", 0, "triton", 1.0, ""),
    )
    said = r"forward of causal tiles \(triton: out differs; flash: RuntimeError: no kernel\); name one \(in a recipe"
    with pytest.raises(ValueError, match=said):
        select("triton", [wrong, failed, right])
    chosen: dict[tuple[Task, Kind], str] = {("backward", "causal"): "triton"}
    assert select("triton", [failed, right]) == Selection("triton", chosen), "the default was not measured there"
    found = select("triton", [wrong, failed, right, wrong._replace(backend="flash_4", seconds=2.0, note="")])
    assert found == Selection("triton", {**chosen, tile: "flash_4"})


def test_an_error_of_the_device_ends_the_measurement(monkeypatch):
    """After one CUDA computes nothing more, so that whatever follows would seem to fail too."""

    def fail(task: str, result: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    add(monkeypatch, "faulty", fail)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        list(measure(QUESTION, "faulty", CPU))


def test_a_rehearsal_computes_each_task_by_the_backend_that_was_chosen_for_it(monkeypatch):
    done: list[tuple[str, str]] = []
    for name in ("first", "second"):
        add(monkeypatch, name, lambda task, result, name=name: done.append((name, task)))
    backends._fits.cache_clear()
    rehearse(QUESTION, str(Selection("first", {("backward", "window"): "second"})), CPU)
    backends._fits.cache_clear()
    assert done == [("second" if tile == ("backward", "window") else "first", tile[0]) for tile in TILES]
