"""`longring evaluate`: start the ranks that evaluate a run, or any weights on other data, target by target."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from ...data.files import write_text
from ...data.format.manifest import Manifest
from ...data.tasks.catalog import chosen_tasks
from ...parallel.config import GPU_QUEUES
from ..checkpoint.format import last_good_checkpoint, no_good_checkpoint
from ..config import Recipe, load_recipe
from ..errors import print_error
from ..evaluation.buckets import check_judged, held_out_buckets
from ..evaluation.compare import comparison_tables
from ..preflight import preflight
from ..ranks.nodes import ManyNodes
from ..ranks.start import local_ranks, start_ranks
from ..run_directory import find_run
from ..weights.on_data import weights_on_data

_MODULE = "longring.launch.evaluate"
FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One call of `longring evaluate`."""

    targets: Sequence[str]
    """Runs, or with `data` any weights, in the order of the tables."""
    overrides: Sequence[str] = ()
    """Settings as key=value."""
    data: str = ""
    """Prepared data, or a recipe that names some and a division among ranks; empty: each run's own."""
    judge: str = ""
    """Weights that choose the key tokens of LongPPL for all targets; empty: each its own."""
    ranks: int | None = None
    """Ranks of this node; None: as many as wrote the last checkpoint or, with `data`, one for each GPU."""
    json_file: str | None = None
    """File for the results."""
    picture: str | None = None
    """File for their picture."""
    nodes: ManyNodes = field(default_factory=ManyNodes)
    """Meeting of several nodes."""

    def start(self, console: Console) -> int:
        """Start ranks for each target in turn and show the results together; return an exit status.

        All targets are checked before the first start, and the results of each are written to `json_file` as soon as
        they are complete. Raises ValueError if there is no run or no checkpoint, for an override that an evaluation
        does not take, or if a file cannot be written.
        """
        for option, file in (("--json", self.json_file), ("--picture", self.picture)):
            if file is not None:
                _check_writable(option, Path(file))
        judges = [self._start_of(self.judge)] if self.judge else []
        starts = [self._start_of(target) for target in self.targets]  # all are checked before the first one's hours
        with tempfile.TemporaryDirectory(prefix="longring-results-") as directory:
            return self._run(judges, starts, Path(directory), console)

    def _run(self, judges: Sequence[_Start], starts: Sequence[_Start], directory: Path, console: Console) -> int:
        keys: list[str] = []
        for judge in judges:
            keys = ["--keys", str(directory / "keys")]
            if status := self._start_ranks(0, judge, ["--choose-keys", str(directory / "keys")]):
                return status
        several, results, status = len(starts) > 1, [], 0
        for number, start in enumerate(starts, 1):  # 0: the judge
            file = directory / f"{number}.json"
            options = ["--json", str(file), *keys, *(["--quiet"] if several else [])]
            if status := self._start_ranks(number, start, options):
                break
            if file.exists():  # on the node of rank 0
                results.append(json.loads(file.read_text()))
                self._write(results)
        if results:
            self._show(results, console)
        if results and status:
            console.print(f"{len(results)} of {len(starts)} targets are complete", highlight=False)
        return status

    def _named(self, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the results under names that tell them apart, as checkpoints of several runs may have one name."""
        if len({result["target"] for result in results}) == len(results):
            return results
        # Targets after one that failed have no results.
        return [{**result, "target": name} for result, name in zip(results, self.targets, strict=False)]

    def _write(self, results: list[dict[str, Any]]) -> None:
        """Write the results of the targets that are complete."""
        if self.json_file is not None:
            whole = results[0] if len(self.targets) == 1 else {"targets": self._named(results)}
            write_text(Path(self.json_file), json.dumps(whole, indent=2) + "\n")

    def _show(self, results: list[dict[str, Any]], console: Console) -> None:
        if len(self.targets) > 1:
            console.print(*comparison_tables(self._named(results)))
        if self.picture is not None:
            from ..report.evaluation_pictures import draw_evaluations  # matplotlib takes a second

            draw_evaluations(self._named(results), Path(self.picture))

    def _start_of(self, target: str) -> _Start:
        """Return how the ranks of a target start. Raises ValueError, which names it, if they would refuse it."""
        try:
            return self._start_on_other_data(target) if self.data else self._start_of_run(target)
        except ValueError as error:
            if len(self.targets) == 1 or target in str(error):
                raise
            raise ValueError(f"{target}: {error}") from error

    def _start_of_run(self, target: str) -> _Start:
        run, overrides = find_run(target, self.overrides)
        if run.path.is_dir() and not run.recipe_file.is_file():
            raise ValueError(
                f"{run.path}: not a run directory, since it has no {run.recipe_file.name}; name the directory of a "
                "run, or with --data the data that other weights are to read"
            )
        recipe = run.recipe(overrides)
        saved = last_good_checkpoint(run.checkpoints)
        if saved is None:
            raise no_good_checkpoint(run.checkpoints)
        count = self.ranks or saved[1].state.world_size
        checked = preflight(recipe, count * self.nodes.nodes, evaluates=True)
        _check_measured(recipe, checked.manifest)
        return _Start([str(run.path), *overrides], count, recipe.parallel.gpu_queues)

    def _start_on_other_data(self, target: str) -> _Start:
        named = load_recipe(self.data) if Path(self.data).is_file() else None
        count = self.ranks or local_ranks(named.train.ranks_per_node if named else 0)
        _, recipe, manifest = weights_on_data(Path(target), self.data, self.overrides, count * self.nodes.nodes)
        _check_measured(recipe, manifest)
        if self.judge:
            check_judged(recipe, manifest)
        queues = named.parallel.gpu_queues if named else GPU_QUEUES
        return _Start([target, *self.overrides, "--data", self.data], count, queues)

    def _start_ranks(self, number: int, start: _Start, options: Sequence[str]) -> int:
        """Start the ranks of one target; `number` tells the meetings of the nodes apart.

        On other data their logs are kept only if they fail.
        """
        rendezvous, queues = self.nodes.rendezvous(number), start.gpu_queues
        if not self.data:
            return start_ranks(_MODULE, [*start.arguments, *options], start.ranks, rendezvous, gpu_queues=queues)
        logs = tempfile.mkdtemp(prefix="longring-evaluate-")
        arguments = [*start.arguments, *options, "--reports", logs]
        status = start_ranks(_MODULE, arguments, start.ranks, rendezvous, gpu_queues=queues)
        if status and any(Path(logs).iterdir()):
            print_error(f"the logs of the ranks are in {logs}")
        else:
            shutil.rmtree(logs)
        return status


class _Start(NamedTuple):
    """A start of the ranks of one target."""

    arguments: list[str]
    """Arguments of each rank, without options for the results."""
    ranks: int
    """Number of ranks on this node."""
    gpu_queues: int
    """Number of queues of each GPU."""


def check_options(
    settings: Sequence[str],
    tasks: Sequence[str],
    judge: str,
    json_file: str | None,
    picture: str | None,
    *,
    has_data: bool,
) -> None:
    """Raise ValueError unless the options of an evaluation go together, and with its settings, as key=value.

    `has_data`: the data that all targets read is named.
    """
    for setting in settings:
        if tasks and setting.partition("=")[0].strip() == "evaluate.tasks":
            raise ValueError(
                f"--tasks {','.join(tasks)}: override {setting!r} chooses tasks too; leave one of them out"
            )
    if picture is not None and Path(picture).suffix not in FORMATS:
        raise ValueError(f"--picture {picture}: not a format of pictures; name a file that ends in .png, .svg or .pdf")
    if json_file is not None and picture is not None and os.path.realpath(json_file) == os.path.realpath(picture):
        raise ValueError(
            f"--json {json_file}, --picture {picture}: are one file, which cannot hold both; name two files"
        )
    if judge and not has_data:
        raise ValueError(f"--judge {judge}: chooses tokens of the data that all targets read; name these with --data")


def _check_measured(recipe: Recipe, manifest: Manifest) -> None:
    """Raise ValueError if a task is unknown or no held-out sequence is read."""
    chosen_tasks(recipe.evaluate.tasks)
    held_out_buckets(recipe, manifest)


def _check_writable(option: str, file: Path) -> None:
    """Raise ValueError unless `file` can be written at the end of the evaluation, which may last hours."""
    for parent in file.parents:
        if os.path.lexists(parent) and not parent.is_dir():
            raise ValueError(f"{option} {file}: {parent} is not a directory; name a file in a directory")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise ValueError(f"{option} {file}: {error.strerror}; name a file where this user may write") from error
    if file.is_dir():
        raise ValueError(f"{option} {file}: is a directory; name a file in it")
