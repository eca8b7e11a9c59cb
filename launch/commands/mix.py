"""The mix of a recipe over its prepared data, for `longring plan`: tables, and on request a picture."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ...data.inspect.mix import mix_tables
from ..config import Recipe
from ..preflight import order_of, prepared_data


def show_mix(recipe: Recipe, console: Console, picture: Path | None) -> None:
    """Print what a run will train of each bucket and source, and draw it over the steps into `picture`.

    If the data is not prepared yet, a line says so. Raises ValueError if there is nothing to draw, or if the curriculum
    does not fit the data.
    """
    directory = recipe.training_directory
    console.print(slots_line(recipe), highlight=False)
    if (manifest := prepared_data(recipe)) is None:
        if picture is not None:
            raise ValueError(f"--mix {picture}: {directory} is not prepared yet; run `longring prepare RECIPE` first")
        console.print(f"mix: known once {directory} is prepared", soft_wrap=True, highlight=False)
        return
    order = order_of(manifest, recipe)
    for table in mix_tables(order, recipe.curriculum):
        console.print(table)
    if picture is not None:
        from ...data.inspect.picture import draw_mix  # the import of matplotlib takes a second

        draw_mix(order, picture)
        console.print(f"drawn: {picture}", soft_wrap=True)


def slots_line(recipe: Recipe) -> str:
    """Return the slots of a step as text, with the ranks among which one may be divided."""
    slot = recipe.curriculum.tokens_of_slot(recipe.lengths, recipe.train.global_batch_tokens)
    count = recipe.train.global_batch_tokens // slot
    ranks = slot // recipe.parallel.tokens_per_rank * recipe.parallel.tensor
    return f"slots of {slot:,} tokens of one bucket, {count:,} in a step, on at most {ranks:,} ranks"
