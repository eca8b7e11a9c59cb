"""Timelines: a picture of a pass, simulated or measured, with the tiles, sends and receives of each rank over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .cost import Event
from .grid import CpGrid
from .plan import FLOWS, Flow, Message, Pass, Tile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS: dict[Flow, str] = {
    "queries": "#4c72b0",
    "keys": "#55a868",
    "query_results": "#c44e52",
    "key_results": "#dd8452",
    "to_heads": "#8172b2",
    "from_heads": "#b39ddb",
}
TILE = "#9a9a9a"
MOST_RANKS = 16
"""Number of ranks up to which all are drawn; beyond it, the ranks of the first, the middle and the last node."""


@dataclass(frozen=True)
class Panel:
    """Pass of a grid with its events."""

    grid: CpGrid
    direction: Pass
    source: str
    """Origin of the times, for the title: "simulated on infiniband"."""
    events: Sequence[Event]

    @property
    def total_s(self) -> float:
        """Seconds from the first start to the last stop of all ranks."""
        return max((e.stop_s for e in self.events), default=0.0) - min((e.start_s for e in self.events), default=0.0)

    @property
    def exposed_s(self) -> float:
        """Exposed communication in seconds: total time minus the compute time of the busiest rank."""
        busy = [0.0] * self.grid.size
        for event in self.events:
            if isinstance(event.item, Tile):
                busy[event.rank] += event.stop_s - event.start_s
        return self.total_s - max(busy)


def shown_ranks(size: int, ranks_per_node: int) -> list[int]:
    """Return the ranks to draw, so that the picture stays legible."""
    if size <= MOST_RANKS:
        return list(range(size))
    per_node = min(ranks_per_node, MOST_RANKS // 2)
    # First rank of the first, the middle and the last node shown.
    firsts = {0, size // 2 // per_node * per_node, (size - 1) // per_node * per_node}
    return [rank for first in sorted(firsts) for rank in range(first, min(first + per_node, size))]


def draw(rows: Sequence[Sequence[Panel]], file: Path, *, ranks_per_node: int) -> None:
    """Write a picture of the panels of one grid: a row for each direction, a column for each origin of times."""
    # Imported late: a plan without a picture needs no matplotlib.
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ranks = shown_ranks(rows[0][0].grid.size, ranks_per_node)
    height = 1.6 + len(rows) * (0.9 + 0.42 * len(ranks))
    figure = Figure(figsize=(9 * len(rows[0]), height), layout="constrained")
    all_axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for row, axes_of_row in zip(rows, all_axes, strict=True):
        for panel, axes in zip(row, axes_of_row, strict=True):
            _draw_panel(panel, ranks, axes)
    flows = {e.item.flow for row in rows for panel in row for e in panel.events if isinstance(e.item, Message)}
    patches = [Patch(color=TILE, label="tile")]
    patches += [Patch(color=COLOURS[flow], label=flow.replace("_", " ")) for flow in FLOWS if flow in flows]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    figure.savefig(file, dpi=100)


def _draw_panel(panel: Panel, ranks: list[int], axes: Axes) -> None:
    """Draw a panel: each rank has three lanes, tiles, sends and receives; in a lane each flow has a line of its own."""
    flows = [f for f in FLOWS if any(isinstance(e.item, Message) and e.item.flow == f for e in panel.events)]
    # Height of each rank, in units of ranks: the first is at the top.
    at = {rank: len(ranks) - 1 - number for number, rank in enumerate(ranks)}
    line = 0.3 / max(1, len(flows))
    origin = min((e.start_s for e in panel.events), default=0.0)
    # One collection of bars for each (colour, bottom, height), in units of ranks: thousands of single bars are slow.
    bars: dict[tuple[str, float, float], list[tuple[float, float]]] = {}
    for event in panel.events:
        if event.rank not in at:
            continue
        # Within a rank's unit: receives from 0.02 up, sends from 0.33, tiles from 0.64 to 0.92.
        span = ((event.start_s - origin) * 1e3, (event.stop_s - event.start_s) * 1e3)
        if isinstance(event.item, Tile):
            bars.setdefault((TILE, at[event.rank] + 0.64, 0.28), []).append(span)
        else:
            lane = 0.33 if event.item.source == event.rank else 0.02
            bottom = at[event.rank] + lane + flows.index(event.item.flow) * line
            bars.setdefault((COLOURS[event.item.flow], bottom, 0.9 * line), []).append(span)
    for (colour, bottom, tall), spans in bars.items():
        axes.broken_barh(spans, (bottom, tall), facecolors=colour, edgecolors="white", linewidth=0.4)
    for rank, bottom in at.items():  # a black line where ranks are left out
        axes.axhline(bottom, color="#cccccc" if rank + 1 in at else "black", linewidth=0.6)
        for text, height in (("tile", 0.78), ("send", 0.48), ("recv", 0.17)):
            axes.text(
                -0.006,
                bottom + height,
                text,
                fontsize=5.5,
                ha="right",
                va="center",
                transform=axes.get_yaxis_transform(),
            )
    axes.set_yticks([bottom + 0.5 for bottom in at.values()], [f"rank {rank}    " for rank in at], fontsize=8)
    axes.tick_params(axis="y", length=0, pad=14)
    axes.set_ylim(0, len(ranks))
    axes.set_xlim(0, max(panel.total_s * 1e3, 1e-9))
    axes.set_xlabel("ms")
    axes.set_title(
        f"{panel.direction}, {panel.grid}, {panel.source}\n"
        f"total {panel.total_s * 1e3:.4g} ms, exposed {panel.exposed_s * 1e3:.3g} ms",
        fontsize=9,
    )
