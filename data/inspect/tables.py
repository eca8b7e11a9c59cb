"""Tables of one style for everything that the commands about data print."""

from rich import box
from rich.table import Table


def make_table(title: str, *columns: str, text: tuple[str, ...] = ()) -> Table:
    """Return an empty table in the style of the data commands; no cell is cut or wrapped.

    Columns are for numbers, at the right, except the columns named in `text` and those without a name (bars), which are
    at the left.
    """
    # Without edges the ledger of 10^9 documents and 10^12 tokens fits 80 columns.
    table = Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        pad_edge=False,
    )
    for column in columns:
        table.add_column(column, justify="left" if not column or column in text else "right", no_wrap=True)
    return table


def bar(share: float, width: int) -> str:
    """Return a bar of `share` in [0, 1] of `width` characters."""
    return "█" * round(width * share)


def shortened(name: str, width: int) -> str:
    """Return `name` in at most `width` characters, with "…" where it is cut.

    A path loses leading directories, because its end tells documents apart; any other name loses its middle.
    """
    if len(name) <= width:
        return name
    # The first "/" after which the rest of the path fits beside the mark.
    end = name.find("/", len(name) - width + 1)
    if end >= 0:
        return f"…{name[end:]}"
    file = name.rpartition("/")[2]
    if len(file) <= width:
        return file
    head = width // 2
    return f"{file[:head]}…{file[head + 1 - width :]}"  # `width` characters with the mark
