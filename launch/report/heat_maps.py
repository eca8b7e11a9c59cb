"""Heat-maps of a report: scores of tasks by length and depth, and the gradient's norm by part of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

from .history import History

Drawing = tuple[str, Callable[[Axes, History], bool], str]
"""Title of a figure, the function that draws it and returns whether there was anything, and its caption."""


def heat_maps(history: History) -> Iterator[Drawing]:
    """Yield the heat-maps that a run may have numbers for."""
    yield "Gradient norm by part", _gradient_norms, "Decimal logarithm of the norm of each layer, before clipping."
    tasks = history.long_context.get("tasks", [])
    step = history.long_context.get("step", 0)
    yield "Tasks by length", partial(_tasks, tasks), f"Share of exact answers after step {step:,}."
    for name in dict.fromkeys(entry["task"] for entry in tasks if len(entry["by_depth"]) > 1):
        yield f"{name} by depth", partial(_depths, [e for e in tasks if e["task"] == name]), "Share of exact answers."


def _tasks(entries: list[dict[str, Any]], axes: Axes, _: History) -> bool:
    names, lengths = (list(dict.fromkeys(entry[key] for entry in entries)) for key in ("task", "length"))
    shares = np.full((len(names), len(lengths)), np.nan)  # [tasks, lengths]
    for entry in entries:
        shares[names.index(entry["task"]), lengths.index(entry["length"])] = entry["exact"]
    return _shares(axes, shares, names, [f"{length:,}" for length in lengths])


def _depths(entries: list[dict[str, Any]], axes: Axes, _: History) -> bool:
    bins = sorted({(part["from"], part["to"]) for entry in entries for part in entry["by_depth"]})
    shares = np.full((len(bins), len(entries)), np.nan)  # [ranges of depth, lengths]
    for column, entry in enumerate(entries):
        for part in entry["by_depth"]:
            shares[bins.index((part["from"], part["to"])), column] = part["exact"]
    axes.set_ylabel("depth")
    return _shares(axes, shares, [f"<{to:.1%}" for _, to in bins], [f"{entry['length']:,}" for entry in entries])


def _shares(axes: Axes, shares: NDArray[np.float64], rows: list[str], lengths: list[str]) -> bool:
    """Draw shares `[rows, lengths]` from 0 to 1, each with its number; NaN: nothing was measured."""
    if not shares.size:
        return False
    axes.pcolormesh(shares, cmap="YlGn", vmin=0, vmax=1)
    axes.invert_yaxis()
    axes.set_xticks(np.arange(len(lengths)) + 0.5, lengths)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.set_xlabel("length in tokens")
    axes.grid(False)
    for (row, column), share in np.ndenumerate(shares):
        if not np.isnan(share):
            colour = "white" if share > 0.6 else "black"  # YlGn is dark there
            axes.text(column + 0.5, row + 0.5, f"{share:.0%}", ha="center", va="center", color=colour)
    return True


def _gradient_norms(axes: Axes, history: History) -> bool:
    prefix = "grad_norms/"
    parts = [name.removeprefix(prefix) for name in history.curves.names() if name.startswith(prefix)]
    curves = [history.curves.curve(prefix + part) for part in parts]
    if not parts:
        return False
    # A bin has the norms of all parts or of none, since one step has them all.
    norms = np.array([curve.mean for curve in curves])  # [parts, bins]
    found = axes.pcolormesh(
        _edges(curves[0].tokens),
        np.arange(len(parts) + 1) - 0.5,
        np.log10(np.maximum(norms, np.finfo(np.float64).tiny)),  # a norm may be 0
        cmap="viridis",
        rasterized=True,  # the vector paths of a long run of many layers would be most of the page
    )
    axes.invert_yaxis()
    every = -(-len(parts) // 14)  # at most 14 labels
    axes.set_yticks(range(0, len(parts), every), [part.replace("blocks.", "layer ") for part in parts[::every]])
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("tokens trained")
    axes.grid(False)
    axes.figure.colorbar(found, ax=axes)
    return True


def _edges(middles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the edges of bins from their middles, which ascend."""
    between = (middles[1:] + middles[:-1]) / 2  # [bins - 1]
    # A bin alone spans half of its tokens to 1.5 times.
    first, last = (between[0], between[-1]) if len(between) else (middles[0] * 1.5, middles[0] * 0.5)
    return np.array([2 * middles[0] - first, *between, 2 * middles[-1] - last])
