"""The table of the grids of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from ...parallel.cp.choose import PricedGrid
from ..tables import plain_table
from .choice import GridChoice

SHOWN_OTHERS = 2
"""Number of further grids shown below the chosen one."""
CAPTION = (
    "ms: forward + backward of a layer; exposed: communication time, ms, that is not\n"
    "hidden behind compute; GiB held: tensors of other ranks; MB sent: by one rank\n"
    "in both passes; best of N factorizations of cp into heads x query x kv: of those\n"
    "within 1% of the fastest, the one that holds least"
)


def grids_table(choices: Sequence[GridChoice], title: str | None = None) -> Table:
    """Return a table with one row for the grid of each layer kind and one for each of the next cheapest grids."""
    columns = ("bucket", "cp", "window", "ms", "exposed", "GiB\nheld", "MB\nsent", "grid")
    table = plain_table(title, *columns, left=["grid"], caption=CAPTION)
    for choice in choices:
        window = f"{choice.kind.window:,}" if choice.kind.window else "full"
        why = "named by the recipe" if choice.named else f"best of {1 + len(choice.others)}"
        *figures, grid = _figures(choice.taken)
        table.add_row(f"{choice.kind.sequence_tokens:,}", str(choice.grid.size), window, *figures, f"{grid} ({why})")
        for number, other in enumerate(choice.others[:SHOWN_OTHERS]):
            *figures, grid = _figures(other)
            table.add_row("", "", "", *figures, grid if number else f"next best: {grid}", style="dim")
        table.add_section()
    return table


def grid_json(choice: GridChoice) -> dict[str, Any]:
    """Return the grid of a layer kind as JSON: its price in seconds and bytes, and the grids it was preferred to."""
    return {
        **choice.kind._asdict(),
        "cp": choice.grid.size,
        "named": choice.named,
        **_price_json(choice.taken),
        "others": [_price_json(other) for other in choice.others],
    }


def _price_json(priced: PricedGrid) -> dict[str, Any]:
    return {
        "grid": str(priced.grid),
        "layer_s": priced.seconds,
        "exposed_s": priced.exposed_s,
        "held_bytes": priced.peak_bytes,
        "sent_bytes_per_rank": sum(price.sent_bytes for price in priced.passes.values()) // priced.grid.size,
    }


def _figures(priced: PricedGrid) -> list[str]:
    sent = sum(price.sent_bytes for price in priced.passes.values()) / priced.grid.size
    return [  # columns from "ms" on
        f"{priced.seconds * 1e3:.3g}",
        f"{priced.exposed_s * 1e3:.3g}",
        f"{priced.peak_bytes / 2**30:.3g}",
        f"{sent / 1e6:.4g}",
        str(priced.grid),
    ]
