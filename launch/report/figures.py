"""The figures of a report, as SVG that stands within a page."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ..records import numbers_of
from .curves import MOST_BINS, Curve
from .heat_maps import heat_maps
from .history import History

# Text stays text, in the font of the page; about 350 points fit a telephone without becoming small.
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "longring",  # equal figures are equal text
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "lines.linewidth": 1.2,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "path.simplify_threshold": 0.3,
}
SIZE = (4.8, 3.0)
SMOOTH = 60
"""Points of a curve of means over many steps."""
MARKED_EVENTS = 100
"""Number of positions along a figure at which it marks events, and maximum number of starts that it marks."""


class Picture(NamedTuple):
    """A figure of the page."""

    title: str
    svg: str
    caption: str


def pictures(history: History) -> Iterator[Picture]:
    """Yield every figure that the run has numbers for."""
    for title, draw, caption in (
        (
            "Loss",
            _loss,
            "Nats per token: means over many steps, over few, and the range of single steps. Held out: means of "
            "evaluations that were not cut short.",
        ),
        ("Loss by bucket", _loss_by_bucket, "Training loss of each sequence length."),
        ("Held-out loss by bucket", _held_out, "Each evaluation of this run."),
        ("Held-out loss by position", _by_position, "Last evaluation: loss at the tokens up to each position."),
        ("Held-out loss by position over time", _position_over_time, "Longest bucket; a line for each range."),
        ("Tokens by bucket", _mix, "Share of each sequence length in the trained tokens."),
        ("Shares by source", _shares, "Share of each source in the tokens from each renewal on."),
        ("Learning rate", _rate, ""),
        ("Gradient norm", _grad_norm, "Before clipping."),
        ("Throughput", _throughput, "All ranks together, by the longest bucket of a step."),
        (
            "Model FLOP utilization",
            _mfu,
            "Share of the devices' peak, by visible pairs and the longest bucket.",
        ),
        ("Memory", _memory, "Peaks of torch's allocator on rank 0 in a step."),
        ("Time of a step", _parts, "Mean of each part on rank 0; waiting for other ranks is a part of its own."),
        *heat_maps(history),
    ):
        figure = Figure(figsize=SIZE, layout="constrained")
        with mpl.rc_context(STYLE):
            axes = figure.subplots()
            if draw(axes, history):
                yield Picture(title, _svg(figure, title), caption)


def _svg(figure: Figure, title: str) -> str:
    """Return the figure without the head of a file, with ids that no other figure of the page has."""
    stream = io.StringIO()
    figure.savefig(
        stream, format="svg", dpi=144, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = stream.getvalue()
    own = re.sub(r"\W+", "-", title.lower())
    text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{own}-", text[text.index("<svg") :])
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def _colours(number: int) -> list[Any]:
    return list(mpl.colormaps["viridis"](np.linspace(0.0, 0.9, max(number, 1))))


def _over_tokens(axes: Axes, history: History, label: str) -> None:
    """Name the axes, and mark the starts of the run and its events."""
    axes.set_xlabel("tokens trained")
    axes.set_ylabel(label)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    resumed = [start["from_step"] for start in history.starts if start.get("from_step")]
    for number, step in enumerate(resumed[-MARKED_EVENTS:]):
        name = None if number else "resumed"  # the legend has all of them once
        axes.axvline(history.curves.tokens_at(step), color="0.4", linestyle=":", linewidth=0.9, label=name)
    told = [event for event in history.events if event.get("event") not in ("evaluation", "renewal")]
    events = [event["step"] for event in told if isinstance(event.get("step"), int)]
    # Events that would be drawn at one position are one mark.
    width = max(history.last.get("tokens", 0), 1) / MARKED_EVENTS
    at = {round(tokens / width): tokens for tokens in map(history.curves.tokens_at, events)}
    if at:
        axes.plot(
            list(at.values()),
            [0] * len(at),
            "|",
            color="tab:red",
            transform=axes.get_xaxis_transform(),  # x in tokens, y from the bottom of the axes
            clip_on=False,
            markersize=9,
            label="events",
        )


def _line(axes: Axes, curve: Curve, label: str | None, colour: Any, *, most: int = SMOOTH, band: bool = False) -> bool:
    """Draw a curve of at most `most` means, and the range of its values if `band`; return whether there was any."""
    if not len(curve.tokens):
        return False
    if band and (curve.high > curve.low).any():
        axes.fill_between(curve.tokens, curve.low, curve.high, color=colour, alpha=0.2, linewidth=0)
    shown = curve.coarser(most)
    if band and len(shown.tokens) < len(curve.tokens):
        axes.plot(curve.tokens, curve.mean, color=colour, alpha=0.35, linewidth=0.7)
    axes.plot(shown.tokens, shown.mean, color=colour, label=label, marker="." if len(shown.tokens) < 12 else None)
    return True


def _loss(axes: Axes, history: History) -> bool:
    if not _line(axes, history.curves.curve("loss"), "training", "tab:blue", band=True):
        return False
    held_out = [(history.curves.tokens_at(e["step"]), e["loss"]) for e in history.whole_evaluations]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:red", markersize=4, label="held out")
        axes.axhline(
            history.whole_evaluations[-1]["unigram_loss"], color="tab:red", linestyle="--", label="unigram, held out"
        )
    _over_tokens(axes, history, "nats per token")
    axes.legend()
    return True


def _by_bucket(axes: Axes, history: History, name: str, suffix: str, label: str) -> bool:
    """Draw the curve of each bucket, `name/LENGTH` and a suffix."""
    colours = _colours(len(history.lengths))
    drawn = [
        _line(axes, history.curves.curve(f"{name}/{length}{suffix}"), f"{length:,}", colour, most=SMOOTH // 2)
        for length, colour in zip(history.lengths, colours, strict=False)
    ]
    if any(drawn):
        _over_tokens(axes, history, label)
        axes.legend(ncols=2)
    return any(drawn)


def _loss_by_bucket(axes: Axes, history: History) -> bool:
    return _by_bucket(axes, history, "buckets", "/loss", "nats per token")


def _throughput(axes: Axes, history: History) -> bool:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    return _by_bucket(axes, history, "tokens_per_s", "", "tokens per second") and _from_zero(axes)


def _mfu(axes: Axes, history: History) -> bool:
    return _by_bucket(axes, history, "mfu", "", "share of peak") and _from_zero(axes)


def _held_out(axes: Axes, history: History) -> bool:
    if len(history.evaluations) < 2:
        return False
    lengths = sorted({entry["bucket"] for e in history.evaluations for entry in e["buckets"]})
    for length, colour in zip(lengths, _colours(len(lengths)), strict=True):
        points = [
            (history.curves.tokens_at(e["step"]), entry["loss"])
            for e in history.evaluations
            for entry in e["buckets"]
            if entry["bucket"] == length
        ]
        axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3, label=f"{length:,}")
    _over_tokens(axes, history, "nats per token")
    axes.legend(ncols=2)
    return True


def _by_position(axes: Axes, history: History) -> bool:
    if not history.evaluations:
        return False
    buckets = history.evaluations[-1]["buckets"]
    for entry, colour in zip(buckets, _colours(len(buckets)), strict=True):
        ends, losses = zip(*((part["to"], part["loss"]) for part in entry["by_position"]), strict=True)
        axes.plot(ends, losses, "o-", color=colour, markersize=3, label=f"{entry['bucket']:,}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value, binary=True)))
    axes.set_xlabel("position in the context")
    axes.set_ylabel("nats per token")
    axes.legend(ncols=2, title="bucket", title_fontsize=7.5)
    return True


def _position_over_time(axes: Axes, history: History) -> bool:
    evaluated = [(e["step"], entry) for e in history.evaluations for entry in e["buckets"]]
    most = max((entry["bucket"] for _, entry in evaluated), default=0)
    longest = [(step, entry) for step, entry in evaluated if entry["bucket"] == most]
    if len(longest) < 2:
        return False
    spans = sorted({(part["from"], part["to"]) for _, entry in longest for part in entry["by_position"]})
    for span, colour in zip(spans, _colours(len(spans)), strict=True):
        points = [
            (history.curves.tokens_at(step), part["loss"])
            for step, entry in longest
            for part in entry["by_position"]
            if (part["from"], part["to"]) == span
        ]
        name = f"{short(span[0], binary=True)} to {short(span[1], binary=True)}"
        axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3, label=name)
    _over_tokens(axes, history, "nats per token")
    axes.legend(ncols=2)
    return True


def _mix(axes: Axes, history: History) -> bool:
    lengths = [n for n in history.lengths if len(history.curves.curve(f"buckets/{n}/targets").tokens)]
    if len(lengths) < 2:
        return False
    at = history.curves.curve("targets").tokens
    counts = np.zeros((len(lengths), len(at)))  # [lengths, bins]
    for row, length in zip(counts, lengths, strict=True):
        curve = history.curves.curve(f"buckets/{length}/targets")
        # Bins of one bucket are among those of all targets, with the same tokens: each is found exactly.
        row[np.searchsorted(at, curve.tokens)] = curve.mean * curve.number
    # Shares over several adjacent bins: one bin may be one step of one bucket.
    width = max(1, len(at) // 40)
    starts = np.arange(0, len(at), width)
    sums = np.add.reduceat(counts, starts, axis=1)  # [lengths, groups of bins]
    shares = sums / np.maximum(sums.sum(0), 1)
    axes.stackplot(at[starts], shares, labels=[f"{n:,}" for n in lengths], colors=_colours(len(lengths)), step="post")
    _over_tokens(axes, history, "share of tokens")
    axes.set_ylim(0, 1)
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return True


def _rate(axes: Axes, history: History) -> bool:
    # All bins: means over more would round the corners of the schedule.
    drawn = _line(axes, history.curves.curve("learning_rate"), None, "tab:blue", most=MOST_BINS)
    _over_tokens(axes, history, "learning rate")
    return drawn and _from_zero(axes)


def _grad_norm(axes: Axes, history: History) -> bool:
    curve = history.curves.curve("grad_norm")
    drawn = _line(axes, curve, None, "tab:blue", band=True)
    _over_tokens(axes, history, "L2 norm")
    # One spike would flatten everything else on a linear scale.
    if drawn and curve.low.min() > 0 and curve.high.max() > 20 * np.median(curve.mean):
        axes.set_yscale("log")
    return drawn


def _memory(axes: Axes, history: History) -> bool:
    drawn = False
    for name, colour in (("peak_gib", "tab:blue"), ("reserved_gib", "tab:gray")):
        curve = history.curves.curve(f"memory/{name}")
        drawn |= _line(axes, curve, name.removesuffix("_gib"), colour)
    if drawn:
        _over_tokens(axes, history, "GiB")
        axes.legend()
    return drawn and _from_zero(axes)


def _parts(axes: Axes, history: History) -> bool:
    names = [name for name in history.curves.names() if name.startswith("ms/")]
    found = {name.removeprefix("ms/"): history.curves.curve(name) for name in names}
    if not found:
        return False
    every = max(found.values(), key=lambda curve: len(curve.tokens))
    stack = np.zeros((len(found), len(every.tokens)))  # [parts, bins]
    for row, curve in zip(stack, found.values(), strict=True):
        bins = np.searchsorted(every.tokens, curve.tokens)
        row[bins] = curve.mean * curve.number / every.number[bins]  # a part such as save is in some steps only
    axes.stackplot(every.tokens, stack, labels=list(found), colors=_colours(len(found)))
    _over_tokens(axes, history, "ms")
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return True


def _shares(axes: Axes, history: History) -> bool:
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in history.renewals:
        values = dict(numbers_of(record))
        for name in (name for name in values if name.startswith("shares/") and "step" in values):
            points[name.removeprefix("shares/")].append((history.curves.tokens_at(int(values["step"])), values[name]))
    for (source, found), colour in zip(points.items(), _colours(len(points)), strict=False):
        axes.plot(*zip(*found, strict=True), color=colour, label=source, drawstyle="steps-post", marker=".")
    if points:
        _over_tokens(axes, history, "share")
        axes.legend()
    return bool(points)


def _from_zero(axes: Axes) -> bool:
    axes.set_ylim(bottom=0)
    return True


def short(value: float, *, binary: bool = False) -> str:
    """Return a number with a unit, such as `1.5M`; with `binary` of 1,024."""
    base: float = 1024 if binary else 1000
    for unit in ("", "k", "M", "B" if not binary else "G"):
        if abs(value) < base:
            return f"{value:.3g}{unit}"
        value /= base
    return f"{value:.3g}T"
