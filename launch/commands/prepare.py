"""`longring prepare`: documents to tokens, sequences and shards, here or in a Slurm array job."""

from __future__ import annotations

import json

from rich.console import Console

from ...data.inspect.as_json import prepared_json
from ...data.inspect.ledger import print_ledgers
from ...data.prepare.prepare import prepare, prepare_part
from ..config import Recipe
from ..settings import parse_part
from .container import Container


def prepare_recipe(
    recipe: Recipe,
    console: Console,
    *,
    workers: int,
    part: str | None,
    partition: str | None,
    time: str,
    container: Container | None,
    verify: bool,
    as_json: bool = False,
) -> None:
    """Prepare the data of a recipe and print its ledger; `as_json` prints it, sizes and buckets as JSON instead.

    With `partition` the work is submitted to Slurm instead, and its tasks run in the container if there is one. With
    `part` = "I/N" only that part of the input shards is prepared, for an array job whose last job prepares without a
    part. With `verify` every shard of finished data is read, and damaged ones are made again. Raises ValueError if the
    data cannot be prepared.
    """
    if verify and (partition or part):
        raise ValueError("--verify: reads and repairs finished data on this machine; leave out --slurm and --part")
    if as_json and (partition or part):
        raise ValueError("--json: prints the whole data once it is prepared; leave out --slurm and --part")
    if container and not partition:
        raise ValueError("--container: the tasks of Slurm jobs run in it; name a partition with --slurm")
    if partition:
        from ...data.prepare.slurm import submit

        if container:
            container.check_runtime()
        words = container.words if container else []
        submit(recipe.data, console, partition=partition, workers=workers, time=time, container=words)
    elif part:
        prepare_part(recipe.data, console, *parse_part(part), workers=workers)
    elif as_json:
        print(
            json.dumps(
                prepared_json(prepare(recipe.data, Console(stderr=True), workers=workers, verify=verify)), indent=1
            )
        )
    else:
        print_ledgers(prepare(recipe.data, console, workers=workers, verify=verify), console)
