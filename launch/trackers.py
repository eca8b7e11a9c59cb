"""Trackers that get the metrics of a run besides metrics.jsonl: TensorBoard, Weights & Biases, trackio. Rank 0 only."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """Trackers of a run."""

    tensorboard: bool = True
    """Write tensorboard/ in the run directory."""
    wandb_project: str = ""
    """Project of Weights & Biases, which needs the package wandb. Empty: none."""
    trackio_project: str = ""
    """Project of trackio, which needs the package trackio. Empty: none."""

    @property
    def projects(self) -> dict[str, str]:
        """Projects by the package that they need."""
        named = {"wandb": self.wandb_project, "trackio": self.trackio_project}
        return {package: project for package, project in named.items() if project}


class Tracker(Protocol):
    """Receiver of metrics."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of a step by name."""
        ...

    def rewind(self, step: int) -> None:
        """Forget all steps after `step`, which are done again."""
        ...

    def close(self) -> None:
        """Finish the records; no more follow."""
        ...


def check_trackers(config: TrackConfig) -> None:
    """Raise ValueError if a package is not installed that a project needs."""
    for package, project in config.projects.items():
        if find_spec(package) is None:
            raise ValueError(
                f"track.{package}_project = {project!r}: the package {package} is not installed; run `pip install "
                f"{package}`, or leave it empty"
            )


def open_trackers(
    config: TrackConfig, directory: Path, run_id: str, from_step: int, recipe: Mapping[str, Any]
) -> list[Tracker]:
    """Return the trackers of a run, which go on after step `from_step`; TensorBoard writes into `directory`."""
    trackers: list[Tracker] = [TensorBoard(directory, from_step)] if config.tensorboard else []
    name = directory.absolute().parent.name
    return trackers + [Project(package, project, name, run_id, recipe) for package, project in config.projects.items()]


class TensorBoard:
    """TensorBoard's files. Its methods raise OSError if they cannot be written."""

    def __init__(self, directory: Path, from_step: int) -> None:
        self._directory = directory
        # An earlier start may have gone beyond its last checkpoint: TensorBoard then hides its steps from here on.
        self._open(from_step + 1)

    def _open(self, purge_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds, for rank 0 alone

        self._writer = SummaryWriter(str(self._directory), purge_step=purge_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of a step; a name without a table is under `train`."""
        for name, value in values.items():
            self._writer.add_scalar(name if "/" in name else f"train/{name}", value, step)

    def rewind(self, step: int) -> None:
        """Forget all steps after `step`."""
        self._writer.close()
        self._open(step + 1)

    def close(self) -> None:
        """Flush the records that are in memory."""
        self._writer.close()


class Project:
    """A project of wandb or trackio, whose calls are alike. Its errors are logged and end nothing but itself."""

    def __init__(self, package: str, project: str, name: str, run_id: str, recipe: Mapping[str, Any]) -> None:
        self._package = package
        self._module: Any = None
        # trackio's init takes no id and resumes a run by its name, so that must be the name of this run alone.
        own = {"id": run_id, "name": name} if package == "wandb" else {"name": f"{name}-{run_id[:8]}"}
        self._module = self._tried(import_module, package)
        self._tried(lambda: self._module.init(project=project, config=dict(recipe), resume="allow", **own))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of a step, which is a value like others: both packages refuse a `step` that goes back."""
        self._tried(lambda: self._module.log({**values, "step": step}))

    def rewind(self, step: int) -> None:
        """Do nothing: the steps that are done again come again."""

    def close(self) -> None:
        """End the run there."""
        self._tried(lambda: self._module.finish())

    def _tried(self, call: Any, *arguments: Any) -> Any:
        """Return the result of a call; after an error, log it and give up this tracker."""
        if self._module is None and not arguments:  # only the import has arguments
            return None
        try:
            return call(*arguments)
        except Exception as error:  # a tracker is another program on another machine: no error of it ends a run
            log.error("%s gets no more metrics: %s", self._package, error)
            self._module = None
            return None
