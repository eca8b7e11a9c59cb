"""Trackers get the metrics, and no error of theirs ends a run."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from longring.launch.trackers import TrackConfig, check_trackers, open_trackers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


class Package:
    """A tracker's module that notes its calls; with `fails`, logging raises."""

    def __init__(self, fails: bool = False) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.fails = fails

    def init(self, **settings: Any) -> None:
        self.calls.append(("init", settings))

    def log(self, values: dict[str, Any]) -> None:
        if self.fails:
            raise ConnectionError("no route to host")
        self.calls.append(("log", values))

    def finish(self) -> None:
        self.calls.append(("finish", {}))


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_project_gets_every_step_under_the_id_of_the_run(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, module := Package())  # type: ignore[arg-type]
    config = TrackConfig(tensorboard=False, **{f"{package}_project": "long"})
    [tracker] = open_trackers(config, tmp_path / "mine" / "tensorboard", "1" * 32, 0, {"train": {"steps": 3}})
    tracker.log(1, {"loss": 2.5, "buckets/64/loss": 2.0})
    tracker.rewind(0)
    tracker.close()
    (_, settings), logged, ended = module.calls
    assert settings["project"] == "long" and settings["config"] == {"train": {"steps": 3}}
    assert "mine" in settings["name"] and "1" * 8 in str(settings)
    assert logged == ("log", {"loss": 2.5, "buckets/64/loss": 2.0, "step": 1})
    assert ended[0] == "finish"


def test_a_project_that_fails_is_given_up(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", module := Package(fails=True))  # type: ignore[arg-type]
    [tracker] = open_trackers(TrackConfig(tensorboard=False, wandb_project="long"), tmp_path, "1" * 32, 0, {})
    tracker.log(1, {"loss": 2.5})
    tracker.log(2, {"loss": 2.5})
    tracker.close()
    assert [name for name, _ in module.calls] == ["init"]
    assert caplog.text.count("wandb gets no more metrics: no route to host") == 1


def test_tensorboard_hides_the_steps_that_are_done_again(tmp_path):
    [board] = open_trackers(TrackConfig(), tmp_path, "1" * 32, 0, {})
    for step in (1, 2, 3):
        board.log(step, {"loss": float(step), "buckets/64/loss": 1.0})
    board.rewind(1)
    board.log(2, {"loss": 9.0})
    board.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(1, 1.0), (2, 9.0)]
    assert [event.step for event in found.Scalars("buckets/64/loss")] == [1]


def test_a_package_that_is_not_installed_is_named_before_a_run(monkeypatch):
    config = TrackConfig(wandb_project="long")
    monkeypatch.setattr("longring.launch.trackers.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="track.wandb_project = 'long': the package wandb is not") as error:
        check_trackers(config)
    assert str(error.value).endswith(" is not installed; run `pip install wandb`, or leave it empty")
    check_trackers(TrackConfig())  # the advice, to leave it empty
    monkeypatch.setattr("longring.launch.trackers.find_spec", lambda name: SimpleNamespace(name=name))
    check_trackers(config)  # the advice, to install it
