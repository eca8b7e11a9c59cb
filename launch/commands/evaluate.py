"""`longring evaluate`: start the ranks that evaluate a run, or any weights on other data."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ...parallel.config import GPU_QUEUES
from ..checkpoint.format import last_good_checkpoint, no_good_checkpoint
from ..config import load_recipe
from ..errors import print_error
from ..ranks.start import local_ranks, start_ranks
from ..run_directory import find_run

_MODULE = "longring.launch.evaluate"


def start_evaluation(
    target: str, overrides: Sequence[str], *, data: str = "", ranks: int | None = None, json_file: str | None = None
) -> int:
    """Start ranks that evaluate a run on its own data or, with `data`, any weights; return an exit status.

    Without `ranks`, they are as many as wrote the last checkpoint or, with `data`, one for each GPU. Raises ValueError
    if there is no run or no checkpoint, for an override that an evaluation does not take, or if `json_file`
    cannot be written.
    """
    outputs = ["--json", json_file] if json_file else []
    if json_file:
        _check_writable(Path(json_file))
    if data:
        return _start_on_other_data([target, *overrides, "--data", data, *outputs], data, ranks)
    run, overrides = find_run(target, overrides)
    if run.path.is_dir() and not run.recipe_file.is_file():
        raise ValueError(
            f"{run.path}: not a run directory, since it has no {run.recipe_file.name}; name the directory of a run, or "
            "with --data the data that other weights are to read"
        )
    recipe = run.recipe(overrides)
    saved = last_good_checkpoint(run.checkpoints)
    if saved is None:
        raise no_good_checkpoint(run.checkpoints)
    settings, queues = [str(run.path), *overrides, *outputs], recipe.parallel.gpu_queues
    return start_ranks(_MODULE, settings, ranks or saved[1].state.world_size, gpu_queues=queues)


def _check_writable(file: Path) -> None:
    """Raise ValueError unless `file` can be written at the end of the evaluation, which may last hours."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise ValueError(f"--json {file}: {error.strerror}; name a file where this user may write") from error
    if file.is_dir():
        raise ValueError(f"--json {file}: is a directory; name a file in it")


def _start_on_other_data(arguments: Sequence[str], data: str, ranks: int | None) -> int:
    """Start ranks whose logs are kept only if they fail."""
    count, queues = ranks or local_ranks(0), GPU_QUEUES
    if Path(data).is_file():
        recipe = load_recipe(data)
        count, queues = ranks or local_ranks(recipe.train.ranks_per_node), recipe.parallel.gpu_queues
    logs = tempfile.mkdtemp(prefix="longring-evaluate-")
    status = start_ranks(_MODULE, [*arguments, "--reports", logs], count, gpu_queues=queues)
    if status and any(Path(logs).iterdir()):
        print_error(f"the logs of the ranks are in {logs}")
    else:
        shutil.rmtree(logs)
    return status
