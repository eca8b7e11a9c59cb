"""The directory of a run that nobody trained: its files, written by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from longring.launch.config import load_recipe
from longring.launch.run_directory import RunDirectory


def step_record(step: int, **values: Any) -> dict[str, Any]:
    """Return the metrics of a step of two buckets, drawn from its number."""
    draw = random.Random(step)
    bucket = draw.choice([64, 128, 256, 512])
    losses = {bucket: 3 + draw.random(), 64: 4 + draw.random()}
    return {
        "step": step,
        "tokens": 2048 * step,
        "targets": 2048,
        "loss": sum(losses.values()) / len(losses),
        "bucket": bucket,
        "cp": 1,
        "buckets": {str(length): {"targets": 2048 // len(losses), "loss": loss} for length, loss in losses.items()},
        "learning_rate": 1e-3 / step,
        "grad_norm": draw.random(),
        "grad_norms": {"embedding": draw.random(), "blocks.0": draw.random(), "head": draw.random()},
        "step_ms": 100.0,
        "tokens_per_s": 20480.0,
        "compilations": 0,
        "outcome": "good",
        **values,
    }


def evaluation(step: int) -> dict[str, Any]:
    """Return the held-out losses of two buckets."""
    buckets = [
        {
            "bucket": length,
            "cp": 1,
            "sequences": 4,
            "tokens": 4 * length,
            "loss": 3.5 + 1 / (1 + step),
            "unigram_loss": 5.0,
            "by_position": [
                {"from": first, "to": to, "loss": 3.5 + 1 / to, "tokens": 4 * (to - first)}
                for first, to in ((0, 64), (64, 128))
                if to <= length
            ],
        }
        for length in (64, 128)
    ]
    return {"step": step, "tokens": 768, "loss": 3.5 + 1 / (1 + step), "unigram_loss": 5.0, "buckets": buckets}


def task(name: str, length: int, exact: float) -> dict[str, Any]:
    """Return the scores of a task at a length, equal at two depths."""
    depths = [
        {"from": n / 2, "to": (n + 1) / 2, "samples": 20, "exact": exact, "tokens": exact, "loss": 2.0}
        for n in range(2)
    ]
    scores = {"exact": exact, "references": exact, "tokens": exact, "loss": 2.0, "gain": 0.5, "margin": None}
    counts = {"task": name, "length": length, "samples": 40, "lower_bound": False}
    return {**counts, **scores, "preferred": None, "by_depth": depths}


def append(file: Path, *records: dict[str, Any]) -> None:
    """Append records to a file."""
    with file.open("a") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records)


def make_run(recipe_file: Path, directory: Path, steps: int, *settings: str) -> RunDirectory:
    """Write the files of a run of `steps` steps, which was resumed after half of them and has had one event."""
    run, time = RunDirectory(directory), "2026-01-01T00:00:00+00:00"
    run.create(load_recipe(recipe_file, [f"run_directory={directory}", *settings]))
    run.logs.mkdir()
    append(run.metrics_file, *map(step_record, range(1, steps + 1)))
    start = {"time": time, "host": "node-1", "run": "1" * 32, "world_size": 2, "git": {"commit": "c" * 40}}
    changed = {"train.steps": {"before": 10, "now": 20}}
    append(run.starts_file, {**start, "from_step": 0}, {**start, "from_step": steps // 2, "changed": changed})
    append(run.saves_file, {"time": time, "step": steps // 2})
    message = "gradients are <b>not</b> finite [red]here[/]"
    append(run.events_file, {"time": time, "event": "step skipped", "step": 3, "rank": 0, "message": message})
    run.evaluation_file.write_text(json.dumps(evaluation(steps)))
    return run
