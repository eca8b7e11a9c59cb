"""`longring order`: prepared documents to contexts of related documents."""

from __future__ import annotations

from rich.console import Console

from ...data.inspect.ledger import print_ledgers
from ...data.order.stages import order
from ..config import Recipe
from ..settings import parse_part


def order_recipe(recipe: Recipe, console: Console, *, workers: int, only: str, part: str, verify: bool) -> None:
    """Order the prepared data of a recipe and print the ledger of the result.

    `only` names a single stage, and `part` = "I/N" limits the stage to tasks I, I + N, I + 2N, ...; in both cases there
    may be no ledger yet. Raises ValueError if the data cannot be ordered.
    """
    ordered = order(
        recipe.data, recipe.order, console, workers=workers, only=only, part=parse_part(part), verify=verify
    )
    if ordered is not None:
        print_ledgers(ordered, console)
