"""The history of a run: its metrics by step and by bucket, evaluations, starts, saves and events."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..records import Record, numbers_of, read_records
from ..run_directory import RunDirectory
from .curves import Curves
from .tail import Tail

_PER_OCTAVE = 32  # 2 ** (1 / 32) is 1.022
_TARGETS = re.compile(r"buckets/(\d+)/targets")


@dataclass
class BucketHistory:
    """The steps whose longest sequences are of one bucket."""

    cp: int
    """Context-parallel degree of the last of these steps."""
    steps: int = 0
    durations: Counter[int] = field(default_factory=Counter)
    """Number of steps by 32 times the binary logarithm of their duration in ms, so that durations are known to 2%."""

    def add(self, step_ms: float) -> None:
        """Count a step."""
        self.steps += 1
        if step_ms > 0:
            self.durations[round(math.log2(step_ms) * _PER_OCTAVE)] += 1

    @property
    def median_ms(self) -> float:
        """Median duration of a step in ms, to 2%; NaN without any."""
        half, seen = self.durations.total() / 2, 0
        for key, count in sorted(self.durations.items()):
            seen += count
            if seen >= half:
                return 2 ** (key / _PER_OCTAVE)
        return math.nan


class History:
    """Records of a run, read from its files. Call `update` again to read what has been added."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.recipe = run.recipe()
        self._metrics = Tail(run.metrics_file)
        self._forget()

    def _forget(self) -> None:
        self.curves = Curves()
        self.buckets: dict[int, BucketHistory] = {}
        self.targets: Counter[int] = Counter()  # trained targets by bucket
        self.outcomes: Counter[str] = Counter()
        self.last: Record = {}
        self.seconds = 0.0

    def update(self) -> None:
        """Read what is new. Raises OSError if a file cannot be read."""
        replaced, records = self._metrics.read()
        if replaced:
            # Metrics that were replaced are read anew from the beginning.
            self._forget()
        for record in records:
            self._add(record)
        run = self.run
        self.starts, self.saves, self.events = map(read_records, (run.starts_file, run.saves_file, run.events_file))
        self.evaluations = run.evaluations()
        self.renewals = read_records(run.renewals_file)

    def _add(self, record: Record) -> None:
        values = dict(numbers_of(record))
        step, bucket = record.get("step"), record.get("bucket")
        if not isinstance(step, int) or step < 1 or not isinstance(bucket, int) or "tokens" not in values:
            return
        if "buckets" not in record:  # written before a step could have several buckets
            values |= {f"buckets/{bucket}/{name}": values[name] for name in ("loss", "targets") if name in values}
        self.curves.add(step, values | {f"{name}/{bucket}": values[name] for name in _BY_BUCKET if name in values})
        of_bucket = self.buckets.setdefault(bucket, BucketHistory(0))
        of_bucket.cp = record.get("cp", 0)
        of_bucket.add(values.get("step_ms", 0.0))
        for name, value in values.items():
            if found := _TARGETS.fullmatch(name):
                self.targets[int(found[1])] += int(value)
        self.outcomes[str(record.get("outcome", ""))] += 1
        self.seconds += values.get("step_ms", 0.0) / 1e3
        self.last = record

    @property
    def lengths(self) -> list[int]:
        """Sequence lengths trained so far, ascending."""
        return sorted({*self.buckets, *self.targets})

    @property
    def whole_evaluations(self) -> list[dict[str, Any]]:
        """The evaluations with a mean loss: those that were not cut short before all buckets were complete."""
        return [e for e in self.evaluations if "loss" in e]

    @property
    def long_context(self) -> dict[str, Any]:
        """The last evaluation that has scores of tasks or of context; empty without one."""
        return next((e for e in reversed(self.evaluations) if e.get("tasks") or e.get("context")), {})

    @property
    def loss(self) -> float:
        """Mean loss of the last bin of steps; NaN without any."""
        found = self.curves.curve("loss").mean
        return float(found[-1]) if len(found) else math.nan


_BY_BUCKET = ("tokens_per_s", "mfu", "mfu_dense")
"""Metrics that a figure shows by bucket."""
