"""The grids of a run as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from ...parallel.cp.choose import PricedGrid
from .choice import GridChoice

SHOWN_OTHERS = 2
"""Grids shown below the one that is taken."""
CAPTION = (
    "ms: forward + backward of a layer; exposed: communication that is not hidden;\n"
    "GiB held of other ranks; MB sent by a rank in both passes; best of N divisions\n"
    "of cp into heads x query x kv"
)


def grids_table(choices: Sequence[GridChoice], title: str | None = None) -> Table:
    """Return a table with a row for the grid of each layer kind and a row for each of the next cheapest."""
    table = Table(
        title=title,
        title_justify="left",
        caption=CAPTION,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("bucket", "cp", "layers", "ms", "exposed", "GiB held", "MB sent"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("grid")
    for choice in choices:
        layers = f"window {choice.kind.window:,}" if choice.kind.window else "full"
        why = "named by the recipe" if choice.named else f"best of {1 + len(choice.others)}"
        *figures, grid = _figures(choice.taken)
        table.add_row(f"{choice.kind.sequence_tokens:,}", str(choice.grid.size), layers, *figures, f"{grid} ({why})")
        for number, other in enumerate(choice.others[:SHOWN_OTHERS]):
            table.add_row("", "", "" if number else "next best", *_figures(other), style="dim")
        table.add_section()
    return table


def _figures(priced: PricedGrid) -> list[str]:
    sent = sum(price.sent_bytes for price in priced.passes.values()) / priced.grid.size
    return [
        f"{priced.seconds * 1e3:.3g}",
        f"{priced.exposed_s * 1e3:.3g}",
        f"{priced.peak_bytes / 2**30:.3g}",
        f"{sent / 1e6:.4g}",
        str(priced.grid),
    ]
