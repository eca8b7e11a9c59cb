"""The pictures of benchmarks/cp_paper.py."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import matplotlib
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle

from .script import Row

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Rows = list[Row]
COLOURS = {
    "ring": "#4c72b0",
    "ring both ways": "#64b5cd",
    "token_ring": "#c44e52",
    "ulysses": "#55a868",
    "hybrid": "#8172b2",
    "square grid": "#ccb974",
}
CLOSE = 1.01
"""Members within 1% of the best share a win: where all communication is hidden, nothing tells them apart."""


def select(rows: Rows, **wanted: object) -> Rows:
    """Return the rows that have all these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def named(rows: Rows) -> Rows:
    """Return the rows of named members: all but auto."""
    return [row for row in rows if row["member"] != "auto"]


def short(num_tokens: int) -> str:
    """Return a number of tokens in units of 2^10 or 2^20."""
    return f"{num_tokens // 2**20}M" if num_tokens >= 2**20 else f"{num_tokens // 2**10}k"


def draw_winners(rows: Rows, fabrics: Sequence[str], models: Sequence[str], file: Path) -> None:
    """Draw by fabric and model the best named member for GPUs and tokens, and its and auto's exposed communication."""
    gpus, tokens = (sorted({row[key] for row in rows}) for key in ("gpus", "tokens"))
    figure, panels = plt.subplots(len(fabrics), len(models), figsize=(15, 10.5), sharex=True, sharey=True)
    order = list(COLOURS)
    for (fabric, model), panel in zip(product(fabrics, models), panels.flat, strict=True):
        # [tokens, GPUs]: the index of the winner, or one past the last where several are within 1%.
        image: list[list[int]] = []
        for y, num_tokens in enumerate(tokens):
            image.append([])
            for x, num_gpus in enumerate(gpus):
                cell = select(rows, model=model, fabric=fabric, gpus=num_gpus, tokens=num_tokens)
                ranked = sorted(named(cell), key=lambda row: row["ms"])
                best, [auto] = ranked[0], select(cell, member="auto")
                ties = sum(row["ms"] <= CLOSE * best["ms"] for row in ranked)
                image[y].append(order.index(best["member"]) if ties == 1 else len(order))
                text = f"{best['exposed_ms'] / best['ms']:.0%}\n{auto['exposed_ms'] / auto['ms']:.0%}"
                panel.text(x, y, text, ha="center", va="center", fontsize=8)
        colours = ListedColormap([*COLOURS.values(), "#eeeeee"])
        panel.imshow(image, cmap=colours, vmin=-0.5, vmax=len(order) + 0.5, origin="lower", aspect="auto", alpha=0.75)
        panel.set_xticks(range(len(gpus)), [f"{n:,}" for n in gpus])
        panel.set_yticks(range(len(tokens)), [short(n) for n in tokens])
        panel.set_title(f"{model}, {fabric}", fontsize=10)
    handles = [Rectangle((0, 0), 1, 1, color=colour, alpha=0.75) for colour in (*COLOURS.values(), "#eeeeee")]
    figure.legend(handles, [*order, "several within 1%"], loc="lower center", ncols=7, frameon=False)
    figure.suptitle(
        "The best named member by GPUs (across) and tokens (up), one layer, forward and backward, simulated.\n"
        "In each cell the share of the time that is exposed communication: of that member, and below it of auto."
    )
    figure.tight_layout(rect=(0, 0.035, 1, 1))
    figure.savefig(file, dpi=90)
    plt.close(figure)


def draw_exposed(rows: Rows, num_tokens: int, fabrics: Sequence[str], models: Sequence[str], file: Path) -> None:
    """Draw by fabric and model the exposed share of every member over GPUs."""
    figure, panels = plt.subplots(len(fabrics), len(models), figsize=(15, 10.5), sharex=True, sharey=True)
    for (fabric, model), panel in zip(product(fabrics, models), panels.flat, strict=True):
        for member in (*COLOURS, "auto"):
            line = sorted(
                select(rows, model=model, fabric=fabric, member=member, tokens=num_tokens), key=lambda row: row["gpus"]
            )
            shares = [row["exposed_ms"] / row["ms"] for row in line]
            style = {"color": "black", "linewidth": 2.5} if member == "auto" else {"color": COLOURS[member]}
            panel.plot([row["gpus"] for row in line], shares, marker="o", markersize=3, label=member, **style)
        panel.set_xscale("log", base=2)
        ticks = sorted({row["gpus"] for row in rows})
        panel.set_xticks(ticks, [f"{n:,}" for n in ticks])
        panel.set_title(f"{model}, {fabric}", fontsize=10)
        panel.grid(alpha=0.3)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=7, frameon=False)
    figure.suptitle(
        f"Share of a layer's time that is exposed communication, {short(num_tokens)} tokens, by GPUs, simulated"
    )
    figure.tight_layout(rect=(0, 0.035, 1, 1))
    figure.savefig(file, dpi=90)
    plt.close(figure)
