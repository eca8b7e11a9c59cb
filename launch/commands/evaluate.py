"""`longring evaluate`: start the ranks that evaluate a run, or any weights on other data, target by target."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ...data.files import write_text
from ...parallel.config import GPU_QUEUES
from ..checkpoint.format import last_good_checkpoint, no_good_checkpoint
from ..config import load_recipe
from ..errors import print_error
from ..evaluation.compare import comparison_tables
from ..ranks.nodes import ManyNodes
from ..ranks.start import local_ranks, start_ranks
from ..run_directory import find_run

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

        Raises ValueError if there is no run or no checkpoint, for an override that an evaluation does not take, or if a
        file cannot be written.
        """
        for option, file in (("--json", self.json_file), ("--picture", self.picture)):
            if file:
                _check_writable(option, Path(file))
        if self.picture and Path(self.picture).suffix not in FORMATS:
            raise ValueError(
                f"--picture {self.picture}: not a format of pictures; name a file that ends in .png, .svg or .pdf"
            )
        if self.judge and not self.data:
            raise ValueError(
                f"--judge {self.judge}: chooses tokens of the data that all targets read; name these with --data"
            )
        with tempfile.TemporaryDirectory(prefix="longring-results-") as directory:
            return self._start(Path(directory), console)

    def _start(self, directory: Path, console: Console) -> int:
        keys = []
        if self.judge:
            if status := self._start_one(0, self.judge, ["--choose-keys", str(directory / "keys")]):
                return status
            keys = ["--keys", str(directory / "keys")]
        files = [directory / f"{number}.json" for number in range(len(self.targets))]
        for number, (target, file) in enumerate(zip(self.targets, files, strict=True), 1):
            quiet = ["--quiet"] if len(self.targets) > 1 else []
            if status := self._start_one(number, target, ["--json", str(file), *keys, *quiet]):
                return status
        if files[-1].exists():  # on the node of rank 0
            self._show([json.loads(file.read_text()) for file in files], console)
        return 0

    def _show(self, results: list[dict[str, Any]], console: Console) -> None:
        if len({result["target"] for result in results}) < len(results):  # checkpoints of several runs
            results = [{**result, "target": name} for result, name in zip(results, self.targets, strict=True)]
        whole = results[0] if len(results) == 1 else {"targets": results}
        if len(results) > 1:
            console.print(*comparison_tables(results))
        if self.json_file:
            write_text(Path(self.json_file), json.dumps(whole, indent=2) + "\n")
        if self.picture:
            from ..report.evaluation_pictures import draw_evaluations  # matplotlib takes a second

            draw_evaluations(results, Path(self.picture))

    def _start_one(self, number: int, target: str, options: Sequence[str]) -> int:
        """Start the ranks of one target; `number` tells the meetings of the nodes apart."""
        if self.data:
            return self._start_on_other_data(number, target, options)
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
        settings, queues = [str(run.path), *overrides, *options], recipe.parallel.gpu_queues
        count = self.ranks or saved[1].state.world_size
        return start_ranks(_MODULE, settings, count, self.nodes.rendezvous(number), gpu_queues=queues)

    def _start_on_other_data(self, number: int, target: str, options: Sequence[str]) -> int:
        """Start ranks whose logs are kept only if they fail."""
        count, queues = self.ranks or local_ranks(0), GPU_QUEUES
        if Path(self.data).is_file():
            recipe = load_recipe(self.data)
            count, queues = self.ranks or local_ranks(recipe.train.ranks_per_node), recipe.parallel.gpu_queues
        logs = tempfile.mkdtemp(prefix="longring-evaluate-")
        arguments = [target, *self.overrides, "--data", self.data, *options, "--reports", logs]
        status = start_ranks(_MODULE, arguments, count, self.nodes.rendezvous(number), gpu_queues=queues)
        if status and any(Path(logs).iterdir()):
            print_error(f"the logs of the ranks are in {logs}")
        else:
            shutil.rmtree(logs)
        return status


def _check_writable(option: str, file: Path) -> None:
    """Raise ValueError unless `file` can be written at the end of the evaluation, which may last hours."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise ValueError(f"{option} {file}: {error.strerror}; name a file where this user may write") from error
    if file.is_dir():
        raise ValueError(f"{option} {file}: is a directory; name a file in it")
