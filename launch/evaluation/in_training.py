"""Evaluations during training: when they are due, and what they measure within their time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...data.format.manifest import Manifest
from ...parallel.mesh import Mesh
from ...parallel.zero import DeepSpeedEngine
from ..build import BucketLayout
from ..config import Recipe
from ..run_directory import RunDirectory
from ..together import on_rank_0
from .measure import Bound, Measurement


@dataclass
class EvaluationsInTraining:
    """Evaluations of a run on its own ranks, with the settings of `longring evaluate`, one rank's part."""

    recipe: Recipe
    run: RunDirectory
    manifest: Manifest
    mesh: Mesh
    engine: DeepSpeedEngine
    layouts: Mapping[int, BucketLayout]
    """Layout of every bucket, by sequence length."""
    at: Callable[[int, str], None]
    """Records that an operation begins after a step."""
    stopped: Callable[[], bool]
    """Whether this rank has been told to stop."""
    _step: int = 0

    def are_due(self, step: int) -> bool:
        """Return whether an evaluation follows a step."""
        every = self.recipe.train.evaluate_every_steps
        return every > 0 and step > 0 and step % every == 0

    def are_owed(self, step: int) -> bool:
        """Return whether an evaluation is due after a step and no record of it exists. Collective.

        Raises CommonError if the records cannot be read.
        """

        def recorded() -> bool:
            return any(entry["step"] == step for entry in self.run.evaluations())

        # `are_due` is equal on all ranks, so all or none enter the collective.
        return self.are_due(step) and not on_rank_0(self.mesh, recorded)

    def measure(self, step: int) -> dict[str, Any] | None:
        """Return the result of `Measurement.measure`, without a change to anything that trains. Collective.

        Returns None if a rank has been told to stop meanwhile.
        """
        self._step = step
        bound, measurement = self._measurement
        bound.begin()
        found = measurement.measure()
        return None if bound.was_stopped else found

    def record(self, step: int, found: Mapping[str, Any]) -> None:
        """Record an evaluation in the run. Raises OSError if it cannot be written. Rank 0 only."""
        self.run.record_evaluation({"target": self.run.path.name, "step": step, **found})

    @cached_property
    def _measurement(self) -> tuple[Bound, Measurement]:
        bound = Bound(
            lambda operation: self.at(self._step, operation),
            self.recipe.train.evaluate_seconds,
            self.stopped,
            self.mesh.device,
        )
        return bound, Measurement.of(self.recipe, self.manifest, self.mesh, self.engine, self.layouts, bound)


def evaluation_line(found: Mapping[str, Any]) -> str:
    """Return one line about an evaluation during training."""
    complete = ", ".join(str(entry["bucket"]) for entry in found["buckets"])
    part = f"of all buckets only {complete} complete, so no mean" if complete else "no bucket is complete"
    told = f"held-out loss {found['loss']:.4f}" if "loss" in found else part
    return told + f" after {found['seconds']:.0f} s" + (f"; {cut}" if (cut := found.get("cut_short")) else "")
