"""All that an evaluation measures of an engine's weights: the held-out loss, and what the settings choose beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ...data.format.bucket import Bucket
from ...data.format.manifest import Manifest
from ...parallel.mesh import Mesh
from ...parallel.zero import DeepSpeedEngine
from ..build import BucketLayout
from ..config import Recipe
from .buckets import held_out_buckets, left_out_buckets
from .documents import DocumentLengths
from .held_out import HeldOutLoss, with_means
from .key_tokens import KeyTokens
from .long_context import long_context
from .score import Scorer


class CutShortError(Exception):
    """An evaluation is to end before it is complete; raised on all ranks alike."""


@dataclass
class Bound:
    """Limit of an evaluation during training, which all ranks apply at the same operation."""

    at: Callable[[str], None]
    """Records that an operation begins."""
    seconds: float
    """Time from `begin` after which no operation begins."""
    stopped: Callable[[], bool]
    """Whether this rank has been told to stop."""
    device: torch.device
    was_stopped: bool = False
    """Whether a rank has been told to stop since `begin`."""
    _ends: float = 0.0

    def begin(self) -> None:
        """Begin to count the time."""
        self._ends, self.was_stopped = time.monotonic() + self.seconds, False

    def __call__(self, operation: str) -> None:
        """Record that an operation begins. Collective.

        Raises CutShortError on all ranks if any is late or has been told to stop.
        """
        self.at(operation)
        found = torch.tensor([time.monotonic() > self._ends, self.stopped()], dtype=torch.float32, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        late, self.was_stopped = map(bool, found.tolist())  # of any rank
        if self.was_stopped:
            raise CutShortError("a signal")
        if late:
            raise CutShortError(
                f"train.evaluate_seconds = {self.seconds:g}: passed before {operation}; raise it, or lower "
                "evaluate.max_tokens_per_bucket or evaluate.samples"
            )


@dataclass(frozen=True)
class Measurement:
    """Measurement of an engine's weights as a recipe's settings choose, one rank's part."""

    held_out: HeldOutLoss
    layouts: Mapping[int, BucketLayout]
    """Layout of each bucket that is evaluated, by length."""
    keys: KeyTokens | None = None
    """Key tokens of LongPPL that another model has chosen."""

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        manifest: Manifest,
        mesh: Mesh,
        engine: DeepSpeedEngine,
        layouts: Mapping[int, BucketLayout],
        at: Callable[[str], None],
    ) -> Measurement:
        """Return the measurement on a mesh; `at` is called with each operation as it begins."""
        return cls(HeldOutLoss(engine, recipe, manifest, mesh, at, DocumentLengths(manifest)), layouts)

    def chosen(self) -> list[tuple[Bucket, int]]:
        """Return the buckets that are evaluated, and the number of sequences of each."""
        found = held_out_buckets(self.held_out.recipe, self.held_out.manifest)
        return [(bucket, number) for bucket, number in found if bucket.length in self.layouts]

    def scorers(self) -> list[Scorer]:
        """Return the scorer of each of these buckets."""
        loss = self.held_out
        return [Scorer(loss.engine, loss.mesh, self.layouts[bucket.length], loss.at) for bucket, _ in self.chosen()]

    def measure(self) -> dict[str, Any]:
        """Return the content of evaluation.json, without target and step. Collective.

        An evaluation that is cut short has the buckets that are complete, and a mean over the buckets only if all are:
        otherwise it could not be compared with that of a whole evaluation. The engine is in evaluation mode meanwhile,
        and in training mode afterwards.
        """
        loss, chosen = self.held_out, self.chosen()
        began, entries, cut = time.monotonic(), [], None
        found: dict[str, Any] = {"left_out": left_out_buckets(loss.recipe, loss.manifest)}
        loss.engine.eval()
        try:
            for bucket, number in chosen:
                entries.append(loss.bucket(bucket, number, self.layouts[bucket.length]))
            long_context(loss.recipe.evaluate, loss.manifest, self.scorers(), found, self.keys)
        except CutShortError as reason:
            cut = str(reason)
        finally:
            loss.engine.train()
        losses = with_means(entries) if len(entries) == len(chosen) else {"buckets": entries}
        return {**losses, **found, **({"cut_short": cut} if cut else {}), "seconds": time.monotonic() - began}
