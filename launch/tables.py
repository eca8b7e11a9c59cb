"""The one style of the tables that launch prints."""

from __future__ import annotations

from collections.abc import Collection
from copy import copy

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text


class _PlainTable(Table):
    """A table whose title and caption take the width of the terminal, however narrow its columns are."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        alone = copy(self)
        alone.title = alone.caption = None
        if self.title:
            yield Text(str(self.title), style="table.title")
        yield from Table.__rich_console__(alone, console, options)
        if self.caption:
            yield Text(str(self.caption), style="table.caption")


def plain_table(title: str | None, *columns: str, left: Collection[str] = (), caption: str | None = None) -> Table:
    """Return an empty table with these columns; without columns it has no head, and rows add the columns.

    The columns named in `left` are left-justified, all others right-justified. Where the terminal is too narrow, cells
    continue on the next line: nothing is cut off.
    """
    table = _PlainTable(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_header=bool(columns),
    )
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    return table
