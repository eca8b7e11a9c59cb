"""Metrics of a run: metrics.jsonl, trackers and the progress line. Rank 0 only."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from ..data.files import read_patiently
from ..data.read.batch_order import Trained
from .records import keep_records, numbers_of
from .run_directory import RunDirectory
from .tables import plain_table
from .trackers import Tracker

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BucketMetrics:
    """The part of one bucket in a step."""

    targets: int
    """Number of targets that the loss counts."""
    loss: float
    """Mean over them, nats per token; null as that of the step."""


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """The metrics of one step: one line of metrics.jsonl."""

    step: int
    """Step, from 1."""
    tokens: int
    """Tokens consumed by weight-changing steps so far; with knots this includes targets that are not trained."""
    targets: int
    """Number of targets of this step that the loss counts."""
    loss: float
    """Mean over the targets of the batch, nats per token; null if it is not finite or the batch was left out."""
    bucket: int
    """Sequence length of the batch, in tokens; the longest, if its slots have several."""
    cp: int
    """Context-parallel degree of that bucket."""
    buckets: dict[int, BucketMetrics]
    """Part of each bucket of the step, by sequence length."""
    learning_rate: float
    """Learning rate of this step."""
    grad_norm: float
    """Norm of the gradient over all parameters, before clipping."""
    grad_norms: dict[str, float]
    """Norm of each part of it: "embedding", "blocks.0", ..., "norm" and "head"; empty but for every
    `train.gradient_norms_every_steps`-th step."""
    step_ms: float
    """Duration of the step on rank 0."""
    tokens_per_s: float
    """Throughput of all ranks together."""
    tflops: float
    """TFLOP/s of each device, by visible pairs of the true documents and windows; nothing counts twice."""
    mfu: float
    """The same as a share of the device's dense bf16 peak; null where that is not known, and above 1."""
    mfu_dense: float
    """Share of the peak if every token saw its whole sequence, as torchtitan and OLMo-core count it; may exceed 1."""
    bits_per_byte: float
    """Loss in bits, divided by the mean bytes of a training target; null for a tokenizer that is not byte-level."""
    ms: dict[str, float]
    """Time of each part on rank 0: data (waiting for the loader), forward, backward and optimizer, without what they
    wait for other ranks, which is communication, sum (over the ranks, with the wait for them), and of what follows the
    step before, beside the duration of this one: save, evaluate and renew."""
    memory: dict[str, float]
    """Peaks of torch's allocator on rank 0 in this step, peak_gib and reserved_gib; empty without a GPU."""
    compilations: int
    """Number of kernels that all ranks compiled in this step, or loaded from a cache; 0 is expected."""
    outcome: str
    """"good", "spike", "non-finite" (skipped by all ranks) or "left out" (after a spike)."""


class MetricsWriter:
    """Writer of the metrics of the steps of a run after `from_step`; call `close` at the end."""

    def __init__(
        self, run: RunDirectory, trackers: Sequence[Tracker], from_step: int, total_steps: int, console: Console
    ) -> None:
        self._file_name = run.metrics_file
        keep_steps(self._file_name, from_step)
        self._file = self._file_name.open("a")
        self._trackers = trackers
        self._console = console
        self._total_steps = total_steps
        self._print_every = max(1, total_steps // 20)
        self._progress = Progress(
            BarColumn(bar_width=6),
            MofNCompleteColumn(),
            TextColumn("{task.fields[line]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=total_steps, completed=from_step, line="")
        self._first_step = from_step + 1
        self._seconds = 0.0
        self._progress.start()

    def close(self) -> None:
        """End the progress line and close the files."""
        self._progress.stop()
        self._file.close()
        for tracker in self._trackers:
            try:
                tracker.close()
            except OSError as error:  # every step is in metrics.jsonl; the error that ended the run must be seen
                log.warning("%s cannot be completed: %s", type(tracker).__name__, error)

    def rewind(self, step: int) -> None:
        """Remove the records of all steps after `step`."""
        self._file.close()  # first: keep_steps replaces the file, and the stream would go on in the old one
        keep_steps(self._file_name, step)
        self._file = self._file_name.open("a")
        for tracker in self._trackers:
            tracker.rewind(step)

    def write(self, metrics: StepMetrics) -> None:
        """Record one step and show it. Raises OSError, with the directory, if the record cannot be written."""
        # JSON has no numbers for NaN and infinity.
        values = finite(asdict(metrics))
        try:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
            # The open file would go on being written in a directory that has been moved away.
            read_patiently(self._file_name, self._file_name.stat)
            tracked = {name: value for name, value in numbers_of(values) if name != "step"}
            for tracker in self._trackers:
                tracker.log(metrics.step, tracked)
        except OSError as error:
            raise OSError(
                f"step {metrics.step}: cannot be recorded in {self._file_name.parent}: {error.strerror or error}; "
                "make room, bring the directory back, or set run_directory to where it is now, and the same command "
                "continues from the last checkpoint"
            ) from error
        self._seconds += metrics.step_ms / 1e3
        # Mean over the steps of this start; earlier starts may have run on other ranks.
        left = (self._total_steps - metrics.step) * self._seconds / (metrics.step - self._first_step + 1)
        several = len(metrics.buckets) > 1
        bucket = f"{len(metrics.buckets)} buckets" if several else f"bucket {metrics.bucket}"
        line = (
            f"loss {metrics.loss:.3f}  {metrics.tokens_per_s:,.0f} tok/s  {bucket}  cp {metrics.cp}  "
            f"{metrics.step_ms:,.0f} ms  {timedelta(seconds=round(left))} left"
        )
        self._progress.update(self._task, completed=metrics.step, line=line)
        # Without a terminal there is no live line, and about twenty lines are printed in all.
        if not self._console.is_terminal and (
            metrics.step % self._print_every == 0 or metrics.step in (self._first_step, self._total_steps)
        ):
            self._console.print(f"step {metrics.step}/{self._total_steps}  {line}", highlight=False, soft_wrap=True)

    def write_evaluation(self, step: int, result: Mapping[str, Any]) -> None:
        """Send the numbers of an evaluation to the trackers; evaluations.jsonl has all of it.

        One that was cut short has the losses of its complete buckets, and no mean.
        """
        values = {"held_out/loss": result["loss"]} if "loss" in result else {}
        values |= {f"held_out/{entry['bucket']}": entry["loss"] for entry in result["buckets"]}
        values |= {f"held_out/{entry['source']}": entry["loss"] for entry in result.get("by_source", ())}
        for entry in result.get("tasks", ()):
            values[f"tasks/{entry['task']}/{entry['length']}"] = entry["exact"]
        for entry in result.get("context", ()):
            values[f"gain_of_context/{entry['length']}"] = entry["gain"]
        for tracker in self._trackers:
            tracker.log(step, values)


def finite(values: Any) -> Any:
    """Return `values`, a tree of tables, with None for every number that JSON does not have."""
    if isinstance(values, Mapping):
        return {name: finite(value) for name, value in values.items()}
    return None if isinstance(values, float) and not math.isfinite(values) else values


def ledger_entry(cell: Trained) -> dict[str, Any]:
    """Return the entry of a cell in trained.json."""
    return {
        "source": cell.source,
        "bucket": cell.length,
        "tokens": cell.tokens,
        "passes": cell.passes,
        **{name: getattr(cell, name) for name in _IN_TOKENS},
    }


def trained_table(trained: Sequence[Trained]) -> Table:
    """Return a table of the tokens trained of each bucket, and of each source if there are several.

    Trained tokens are reached + repeated; the tokens of a row are reached + not reached.
    """
    columns = ("", "trained", "passes", "reached", "repeated", "not reached")
    table = plain_table("Tokens of the training data", *columns, left=("",))

    def row(name: str, cells: Sequence[Trained]) -> None:
        # In tokens, as every column but the passes.
        sequences, available = (sum(getattr(cell, key) * cell.length for cell in cells) for key in _IN_SEQUENCES)
        counts = (sum(getattr(cell, key) for cell in cells) for key in _IN_TOKENS)
        passes = f"{sequences / available:.2f}" if available else ""
        table.add_row(name, f"{sequences:,}", passes, *(f"{count:,}" for count in counts))

    for length in sorted({cell.length for cell in trained}):
        row(f"{length:,}", [cell for cell in trained if cell.length == length])
    sources = list(dict.fromkeys(cell.source for cell in trained))
    if len(sources) > 1:
        table.add_section()
        for source in sources:
            row(source, [cell for cell in trained if cell.source == source])
    table.add_section()
    row("all", trained)
    return table


_IN_SEQUENCES = ("sequences", "available")
_IN_TOKENS = ("reached_tokens", "repeated_tokens", "not_reached_tokens")


def keep_steps(file: Path, last_step: int) -> None:
    """Remove the records of all steps after `last_step`, which a run does again after its last checkpoint."""
    keep_records(file, lambda record: isinstance(step := record.get("step"), int) and step <= last_step)
