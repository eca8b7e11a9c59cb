"""The one style of the tables that launch prints."""

from __future__ import annotations

from collections.abc import Collection

from rich import box
from rich.table import Table


def plain_table(title: str | None, *columns: str, left: Collection[str] = (), caption: str | None = None) -> Table:
    """Return an empty table with these columns; without columns it has no head, and rows add the columns.

    The columns named in `left` are left-justified, all others right-justified. Where the terminal is too narrow, cells
    continue on the next line: nothing is cut off.
    """
    table = Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_header=bool(columns),
    )
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    return table
