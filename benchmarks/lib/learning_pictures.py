"""Pictures of the experiments on learning: marks are means over the seeds of an arm, bars their standard deviations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
from longring.launch.report.evaluation_pictures import draw_heat_map
from longring.launch.report.figures import STYLE, short
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from .learning import GATE_GAIN, GATE_RIGHT, copying, right_tokens, spread
from .script import Row

WIDTH, HEIGHT = 4.4, 3.4
"""Size of one panel, inches."""
COLOURS = ("black", "#c44e52", "#4c72b0", "#55a868", "#8172b2", "#ccb974", "#64b5cd", "#8c613c")
"""Colours of the arms; the first is that of a baseline."""


def panels(rows: int, columns: int) -> tuple[Figure, NDArray[Any]]:
    """Return a figure and its axes, `[rows, columns]`."""
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def finish(figure: Figure, labelled: Axes, title: str, file: Path) -> None:
    """Give a figure a title and, below it, the legend of one of its panels; write it."""
    handles, labels = labelled.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6))
    figure.suptitle(title)
    figure.savefig(file, dpi=100)


def draw_line(axes: Axes, points: Mapping[Any, Sequence[float]], **style: Any) -> None:
    """Draw the mean of the values at each x, and a bar of their standard deviation where there are several."""
    means, deviations = zip(*(spread(values) for values in points.values()), strict=True)
    bars = [deviation or 0 for deviation in deviations]
    axes.errorbar(list(points), means, yerr=bars, capsize=2, marker="o", markersize=3, **style)


def over_lengths(axes: Axes, label: str) -> None:
    """Make the x axis one of numbers of tokens, each the double of the one before."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: short(value, binary=True))
    axes.set_xlabel(label)


def draw_lengths(rows: Sequence[Row], lines: Sequence[Row], baseline: str, file: Path) -> None:
    """Draw the cells of decomposition.py and their summary: losses by position, length, tokens and seconds.

    Differences are to the baseline with the same seed; a cell whose baseline is not there yet has none.
    """
    of = {(row["arm"], row["seed"]): row["checkpoints"] for row in rows}
    arms = sorted((line["arm"] for line in lines), key=lambda arm: arm != baseline)
    colours = dict(zip(arms, COLOURS, strict=False))
    with mpl.rc_context(STYLE):
        figure, axes = panels(2, 3)
        (positions, less_by_position, less_by_length), (tokens, seconds, reached) = axes
        for arm in arms:
            style = {"color": colours[arm], "label": arm}
            seeds = [seed for name, seed in of if name == arm]
            loss, less, by_length = (defaultdict(list) for _ in range(3))
            for seed in seeds:
                theirs = of[baseline, seed][-1]["buckets"] if (baseline, seed) in of else None
                for number, bucket in enumerate(of[arm, seed][-1]["buckets"]):
                    if theirs:
                        by_length[bucket["length"]].append(bucket["loss"] - theirs[number]["loss"])
                for number, (stop, value, _) in enumerate(of[arm, seed][-1]["buckets"][-1]["by_position"]):
                    loss[stop].append(value)
                    if theirs:
                        less[stop].append(value - theirs[-1]["by_position"][number][1])
            for panel, points in ((positions, loss), (less_by_position, less), (less_by_length, by_length)):
                if points:
                    draw_line(panel, points, **style)
            for panel, key in ((tokens, "tokens"), (seconds, "seconds")):
                checkpoints = list(zip(*(of[arm, seed] for seed in seeds), strict=True))  # [checkpoints, seeds]
                points = {mean(one[key] for one in same): [one["loss"] for one in same] for same in checkpoints}
                draw_line(panel, points, **style)
        draw_times(reached, lines, baseline, colours)
        longest = rows[0]["checkpoints"][-1]["buckets"][-1]["length"]
        over_lengths(positions, f"position in documents of {longest:,} tokens or more")
        over_lengths(less_by_position, f"position in documents of {longest:,} tokens or more")
        over_lengths(less_by_length, "length of the document, tokens")
        positions.set_ylabel("held-out loss, nats per token")
        for panel in (less_by_position, less_by_length):
            panel.set_ylabel(f"loss less that of {baseline}")
        for panel, label in ((tokens, "tokens trained"), (seconds, "CPU seconds of the steps")):
            panel.xaxis.set_major_formatter(lambda value, _: short(value))
            panel.set_xlabel(label)
            panel.set_ylabel("held-out loss, all documents")
        for line in lines:
            if line["arm"] == baseline:
                for panel in (tokens, seconds):
                    panel.axhline(line["loss"][0], color="0.6", linestyle="dotted")
        title = "Beginnings of held-out documents; means and standard deviations over the seeds"
        finish(figure, tokens, title, file)


def draw_times(axes: Axes, lines: Sequence[Row], baseline: str, colours: Mapping[str, str]) -> None:
    """Draw the tokens and seconds in which arms come to the last loss of the baseline, as shares of its own."""
    others = [line for line in reversed(lines) if line["arm"] != baseline]
    for y, line in enumerate(others):
        for key, offset, marker in (("tokens_to_baseline", 0.15, "o"), ("seconds_to_baseline", -0.15, "s")):
            if line[key]:  # a seed has reached it
                (share, deviation), colour = line[key], colours[line["arm"]]
                axes.errorbar(share, y + offset, xerr=deviation, capsize=2, marker=marker, color=colour)
    labels = [f"{line['arm']}\n{line['reached']} of {line['seeds']} seeds" for line in others]
    axes.set_yticks(range(len(others)), labels)
    axes.set_ylim(-0.6, max(len(others), 1) - 0.4)
    axes.axvline(1, color="0.6", linestyle="dotted")
    axes.set_xlabel(f"tokens (circle) and seconds (square) to the last loss\nof {baseline}, over its own")


def draw_related(rows: Sequence[Row], arms: Sequence[str], file: Path) -> None:
    """Draw the cells of related_prefixes.py: gain and losses by the number of documents before, for each order."""
    with mpl.rc_context(STYLE):
        figure, [[gains, losses]] = panels(1, 2)
        for arm, colour in zip(arms, COLOURS[1:], strict=False):
            mine = [row for row in rows if row["arm"] == arm]
            if not mine:
                continue
            alone = {0: [row["alone"] for row in mine]}
            counts = list(zip(*(row["behind"] for row in mine), strict=True))  # [numbers of documents, seeds]
            behind = {
                key: {same[0]["documents"]: [one[key] for one in same] for same in counts}
                for key in ("gain", "related", "other")
            }
            draw_line(gains, behind["gain"], color=colour, label=arm)
            draw_line(losses, alone | behind["related"], color=colour, label=f"{arm}, related")
            draw_line(losses, alone | behind["other"], color=colour, label=f"{arm}, others", linestyle="dashed")
        gains.axhline(0, color="0.6", linestyle="dotted")
        gains.set_ylabel("gain of related documents over others,\nnats per token")
        losses.set_ylabel("loss of the document, nats per token")
        for panel in (gains, losses):
            panel.set_xlabel("number of documents before")
            panel.xaxis.get_major_locator().set_params(integer=True)
        finish(figure, losses, "A held-out document behind documents of its package, and behind others as long", file)


def draw_knots(rows: Sequence[Row], arms: Sequence[str], lengths: Sequence[int], file: Path) -> None:
    """Draw the cells of untie_the_knots.py: needles by depth and length, and all scores by length, for each share."""
    of = {arm: [row for row in rows if row["arm"] == arm] for arm in arms}
    with mpl.rc_context(STYLE):
        scores = ("needles, right tokens", "backtraces, right tokens", "gain of copying, nats", "held-out loss, nats")
        figure, axes = panels(2, max(len(arms), len(scores)))
        for panel, arm in zip(axes[0], arms, strict=False):
            if of[arm]:
                draw_heat_map(panel, mean_needles(of[arm], lengths), "needles, all kinds", "tokens")
        for panel in axes[0]:
            panel.set_visible(bool(panel.images))
        for panel in axes[1, len(scores) :]:
            panel.set_visible(False)
        for arm, colour in zip(arms, COLOURS, strict=False):
            by_length = [
                (
                    [right_tokens(row, "needle", length) for row in of[arm]],
                    [right_tokens(row, "backtrace", length) for row in of[arm]],
                    [copying(row, length)[0] for row in of[arm]],
                    [bucket["loss"] for row in of[arm] for bucket in row["buckets"] if bucket["length"] == length],
                )
                for length in lengths
            ]
            for panel, values in zip(axes[1], zip(*by_length, strict=True), strict=False):
                if of[arm]:
                    draw_line(panel, dict(zip(lengths, values, strict=True)), color=colour, label=arm)
        for panel, score in zip(axes[1], scores, strict=False):
            over_lengths(panel, "length, tokens")
            panel.set_ylabel(score)
        title = "After the extension, by share of tied sequences; means and standard deviations over the seeds"
        finish(figure, axes[1, 0], title, file)


def mean_needles(rows: Sequence[Row], lengths: Sequence[int]) -> Row:
    """Return the right tokens of all needles of several evaluations by length and depth, as of one evaluation."""
    tasks = []
    for length in lengths:
        found: dict[tuple[float, float], list[float]] = defaultdict(list)
        for row in rows:
            for task in row["tasks"]:
                if task["task"].startswith("needle") and task["length"] == length:
                    for part in task["by_depth"]:
                        found[part["from"], part["to"]].append(part["tokens"])
        parts = [{"from": low, "to": high, "tokens": mean(values)} for (low, high), values in found.items()]
        tasks.append({"task": "needles, all kinds", "length": length, "by_depth": parts})
    return {"target": rows[0]["arm"], "step": rows[0]["step"], "tasks": tasks}


def draw_copying(rows: Sequence[Row], lengths: Sequence[int], file: Path) -> None:
    """Draw the cells of copying.py, for each of some lengths: gain and share of right tokens by tokens trained."""
    with mpl.rc_context(STYLE):
        figure, axes = panels(len(lengths), 2)
        for (gains, rights), length in zip(axes, lengths, strict=True):
            for row, colour in zip(rows, COLOURS, strict=False):
                for task, line in (("copy_text", "solid"), ("copy_random", "dashed")):
                    found = {one["tokens"]: copying(one, length, task) for one in row["checkpoints"]}
                    label = f"{row['arm']}, {task.removeprefix('copy_')}"
                    for panel, number in ((gains, 0), (rights, 1)):
                        points = {tokens: [values[number]] for tokens, values in found.items()}
                        draw_line(panel, points, color=colour, label=label, linestyle=line)
            gains.axhline(GATE_GAIN, color="0.6", linestyle="dotted")
            rights.axhline(GATE_RIGHT, color="0.6", linestyle="dotted")
            gains.set_ylabel(f"gain at {length:,} tokens, nats per token")
            rights.set_ylabel(f"share that is right at {length:,} tokens")
            for panel in (gains, rights):
                panel.xaxis.set_major_formatter(lambda value, _: short(value))
                panel.set_xlabel("tokens trained")
        title = "The second half of a sequence as the first, held-out text and random tokens; dotted: the gate for text"
        finish(figure, axes[0, 0], title, file)
