"""The state of a run as its files tell it, for anybody who can read its directory."""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from statistics import fmean, median
from typing import Any, Literal

from ...data.lock import holder
from ..records import Record, read_records
from ..run_directory import RunDirectory
from .tail import Tail

RECENT_STEPS = 120
"""Number of last steps that rates and the time left are taken from."""
RECENT_BYTES = 1 << 20
"""Bytes at the end of metrics.jsonl in which the last steps are looked for at first."""
FRESH_S = 300.0
"""Age of the last step up to which a run counts as going on where its file system has no locks."""

Going = Literal["running", "finished", "stopped", "not started"]


@dataclass(frozen=True, kw_only=True)
class RunState:
    """State of a run at one moment."""

    going: Going
    """Whether it trains now, has all of its steps, or has ended before them."""
    holder: str
    """The process that trains, with its machine and start; empty if none does."""
    step: int
    """Steps done."""
    steps: int
    """Steps of the whole run."""
    recent: list[Record]
    """Metrics of the last steps, oldest first."""
    idle_s: float | None
    """Seconds since the last step was recorded; None before the first step of the last start."""
    saved_step: int | None
    """Step of the last checkpoint."""
    saved: str
    """Time at which the last checkpoint became visible."""
    held_out: tuple[int, float] | None
    """Step and held-out loss of the last evaluation that was not cut short."""
    hangs: list[str]
    """Reports of ranks without progress, which a rank withdraws when it goes on."""

    @property
    def loss(self) -> float | None:
        """Loss of the last step that has one, nats per token."""
        return next((r["loss"] for r in reversed(self.recent) if isinstance(r.get("loss"), float)), None)

    @property
    def step_s(self) -> float | None:
        """Mean duration of the recent steps."""
        found = [r["step_ms"] / 1e3 for r in self.recent if isinstance(r.get("step_ms"), float)]
        return fmean(found) if found else None

    @property
    def tokens_per_s(self) -> float | None:
        """Median throughput of the recent steps."""
        found = [r["tokens_per_s"] for r in self.recent if isinstance(r.get("tokens_per_s"), float)]
        return median(found) if found else None

    @property
    def seconds_left(self) -> float | None:
        """Time for the steps that are left, at the mean duration of the recent ones."""
        return None if self.step_s is None else (self.steps - self.step) * self.step_s

    @property
    def pulse(self) -> str:
        """State of the ranks as the files tell it, in words."""
        if self.hangs:
            return "; ".join(self.hangs)
        if self.going != "running":
            return "no rank runs"
        if self.idle_s is None or self.step_s is None:
            return "before the first step"
        if self.idle_s > max(60.0, 20 * self.step_s):
            return f"no step for {in_words(self.idle_s)} (logs/ and events.jsonl may say why)"
        return f"all ranks took part in the last step, {in_words(self.idle_s)} ago"

    def to_json(self) -> dict[str, Any]:
        """Return the state as `longring watch --json` prints it."""
        return {
            "state": self.going,
            "holder": self.holder,
            "step": self.step,
            "steps": self.steps,
            "tokens": self.recent[-1].get("tokens") if self.recent else 0,
            "loss": self.loss,
            "tokens_per_s": self.tokens_per_s,
            "step_s": self.step_s,
            "seconds_left": self.seconds_left,
            "idle_s": self.idle_s,
            "saved_step": self.saved_step,
            "held_out_loss": self.held_out and self.held_out[1],
            "hangs": self.hangs,
            "last_step": self.recent[-1] if self.recent else None,
        }


class Observer:
    """A reader of the state of a run. Raises ValueError if the directory holds no run."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.steps = run.recipe().train.steps
        self._tail = Tail(run.metrics_file, RECENT_BYTES)
        self._recent: deque[Record] = deque(maxlen=RECENT_STEPS)

    def state(self) -> RunState:
        """Return the present state; only what was added to the files since the last call is read."""
        # Before the metrics: a run that ends meanwhile has then written its last steps.
        try:
            process = holder(self.run.lock_file) or ""
        except OSError:  # a file system without locks: only new records show that the run goes on
            process = None
        replaced, records = self._tail.read()
        if replaced:
            self._recent.clear()
        self._recent.extend(record for record in records if isinstance(record.get("step"), int))
        step = self._recent[-1]["step"] if self._recent else 0
        starts = read_records(self.run.starts_file)[-1:]
        # The last step is of an earlier start if this one begins after it.
        stepped = self._recent and not (starts and starts[0].get("from_step") == step)
        # Every step appends to the file. Clocks of two machines may differ.
        idle_s = max(0.0, time.time() - self.run.metrics_file.stat().st_mtime) if stepped else None
        if process is None:
            fresh = idle_s is not None and idle_s < FRESH_S and step < self.steps
            process = "a process (no locks on this file system)" if fresh else ""
        ended: Going = "finished" if step >= self.steps else "stopped" if step else "not started"
        saves, whole = read_records(self.run.saves_file)[-1:], [e for e in self.run.evaluations() if "loss" in e]
        return RunState(
            going="running" if process else ended,
            holder=process,
            step=step,
            steps=self.steps,
            recent=list(self._recent),
            idle_s=idle_s,
            saved_step=saves[0].get("step") if saves else None,
            saved=str(saves[0].get("time", "")) if saves else "",
            held_out=(whole[-1]["step"], whole[-1]["loss"]) if whole else None,
            hangs=self._hangs(),
        )

    def _hangs(self) -> list[str]:
        found = []
        for file in sorted(self.run.logs.glob("rank-*.hang.json")):
            try:
                position = json.loads(file.read_text())
                rank = int(file.name.split("-")[1].split(".")[0])  # of rank-00003.hang.json
                found.append(f"rank {rank} without progress at step {position['step']}, {position['operation']}")
            except (OSError, ValueError, KeyError, TypeError):  # withdrawn, or being written
                continue
        return found


def in_words(seconds: float) -> str:
    """Return a duration as `3 s`, `2:05:10` or `3.5 days`."""
    if seconds >= 48 * 3600:
        return f"{seconds / 86400:.1f} days"
    return f"{seconds:.0f} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))
