"""The mix of a run as tables: the shares asked and given, the passes, and the tokens that no step reaches."""

from collections.abc import Iterable, Mapping

from rich.table import Table

from ..curriculum_config import CurriculumConfig, Share
from ..read.batch_order import BatchOrder, Trained
from .tables import make_table, shortened

NAME = 22
"""Maximum characters of a name; the numbers beside it then fit 80 columns up to 10^13 tokens."""


def mix_tables(order: BatchOrder, curriculum: CurriculumConfig) -> Iterable[Table]:
    """Yield the mix of a whole run by bucket, and by source if there are several; then the cells that are named."""
    asked = curriculum.shares
    cells = order.trained(len(order.slots))
    sources = list(dict.fromkeys(cell.source for cell in cells))
    kinds = {  # kind of group → name → cells
        "bucket": {f"@{length}": [cell for cell in cells if cell.length == length] for length in order.lengths},
        "source": {name: [cell for cell in cells if cell.source == name] for name in sources if len(sources) > 1},
        # A name with "@" after its first character, such as "books@65536", is a cell; "@65536" is a bucket.
        "cell": {name: [c for c in cells if name == f"{c.source}@{c.length}"] for name in asked if "@" in name[1:]},
    }
    for kind, groups in kinds.items():
        if groups:
            table = _table(kind, groups, cells, asked)
            if curriculum.renewal.rate:
                table.caption = "Shares until the first renewal; then they follow the held-out losses."
            yield table


def _table(
    kind: str, groups: Mapping[str, list[Trained]], cells: tuple[Trained, ...], asked: Mapping[str, Share]
) -> Table:
    """Return the mix by one kind of groups of cells."""
    table = make_table(f"Mix by {kind}", kind, "of the data", "asked", "given", "passes", "never reached", text=(kind,))
    trained = sum(cell.tokens for cell in cells)
    available = sum(cell.available * cell.length for cell in cells)
    for name, group in groups.items():
        tokens, own = sum(cell.tokens for cell in group), sum(cell.available * cell.length for cell in group)
        table.add_row(
            shortened(name, NAME),
            f"{own / available:.1%}",
            _asked(asked.get(name)),
            f"{tokens / trained:.1%}",
            f"{tokens / own:.2f}" if own else "",
            f"{sum(cell.not_reached_tokens for cell in group):,}",
        )
    return table


def _asked(share: Share | None) -> str:
    """Return a share as text: "30.0%", or "10.0% to 40.0%" over the run; nothing where the recipe names none."""
    if share is None:
        return ""
    if isinstance(share, int | float):
        return f"{share:.1%}"
    return f"{share[0][1]:.0%} to {share[-1][1]:.0%}"
