"""Pictures of evaluations: loss by position, gain of context, and heat-maps of tasks by depth and length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .figures import STYLE, short

Result = Mapping[str, Any]
"""Content of evaluation.json."""
WIDTH, HEIGHT = 4.4, 3.2
"""Size of one part of a picture, inches."""
MOST_COLUMNS = 4
"""Most heat-maps side by side."""


def draw_evaluations(results: Sequence[Result], file: Path) -> None:
    """Draw evaluations side by side into a file, whose suffix names its format."""
    tasks = tasks_with_depth(results)
    columns = min(MOST_COLUMNS, max(2, len(results)))
    # Several targets stand side by side, so each task begins a row; the tasks of one target follow each other.
    parts_of_task = -(-len(results) // columns) * columns if len(results) > 1 else 1
    rows = 1 + -(-len(tasks) * parts_of_task // columns)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows), layout="constrained")
    with mpl.rc_context(STYLE):
        axes = figure.subplots(rows, columns, squeeze=False)
        # Axes of heat-maps are shown when one is drawn: the last of a row may stay empty.
        for one in axes.flatten()[2:]:
            one.set_visible(False)
        draw_positions(axes[0, 0], results)
        draw_context(axes[0, 1], results)
        heat_maps = axes[1:].flatten()
        for number, task in enumerate(tasks):
            for one, result in zip(heat_maps[number * parts_of_task :], results, strict=False):
                one.set_visible(True)
                draw_heat_map(one, result, task)
        figure.savefig(file, dpi=120)


def tasks_with_depth(results: Sequence[Result]) -> list[str]:
    """Return the names of the tasks that any result has scores by depth of."""
    entries = (entry for result in results for entry in result.get("tasks", ()))
    return list(dict.fromkeys(entry["task"] for entry in entries if entry["by_depth"]))


def draw_positions(axes: Axes, results: Sequence[Result]) -> None:
    """Draw the held-out loss by position in the longest bucket, a line for each result."""
    for result in results:
        longest = max(result["buckets"], key=lambda entry: entry["bucket"])
        ends, losses = zip(*((part["to"], part["loss"]) for part in longest["by_position"]), strict=True)
        axes.plot(ends, losses, "o-", markersize=3, label=f"{result['target']}, step {result['step']:,}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: short(value, binary=True))
    axes.set_xlabel("position in the context")
    axes.set_ylabel("nats per token")
    axes.set_title("held-out loss by position", fontsize="medium")
    axes.legend()


def draw_context(axes: Axes, results: Sequence[Result]) -> None:
    """Draw the loss of the last eighth of the longest sequences by the share of the sequence visible before it."""
    measured = [(result, result["context"][-1]) for result in results if result.get("context")]  # lengths ascend
    axes.set_visible(bool(measured))
    for result, entry in measured:
        eighths = np.arange(len(entry["losses"])) / 8
        axes.plot(eighths, entry["losses"], "o-", markersize=3, label=f"{result['target']}, {entry['length']:,} tokens")
    axes.set_xlabel("share of the sequence visible before the last eighth")
    axes.set_ylabel("nats per token")
    axes.set_title("loss of the last eighth", fontsize="medium")
    axes.legend()


def draw_heat_map(axes: Axes, result: Result, task: str, score: Literal["exact", "tokens"] = "exact") -> None:
    """Draw a score of a task by depth (from top to bottom) and length, as numbers on colours."""
    entries = [entry for entry in result.get("tasks", ()) if entry["task"] == task and entry["by_depth"]]
    depths = sorted({(part["from"], part["to"]) for entry in entries for part in entry["by_depth"]})
    values = np.full((max(len(depths), 1), max(len(entries), 1)), np.nan)  # [ranges of depth, lengths]
    for column, entry in enumerate(entries):
        for part in entry["by_depth"]:
            values[depths.index((part["from"], part["to"])), column] = part[score]
    axes.imshow(values, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.grid(visible=False)
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "black" if 0.1 < value < 0.93 else "white"  # the colours of the ends are dark
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize="small", color=colour)
    axes.set_xticks(range(len(entries)), labels=[f"{entry['length']:,}" for entry in entries])
    axes.set_yticks(range(len(depths)), labels=[f"<{stop:.1%}" for _, stop in depths])
    axes.set_xlabel("length, tokens")
    axes.set_ylabel("depth")
    title = {"exact": "exact match", "tokens": "right tokens"}[score]
    axes.set_title(f"{task}: {title}\n{result['target']}, step {result['step']:,}", fontsize="medium")
