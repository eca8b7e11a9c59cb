"""`longring evaluate`: start the ranks that evaluate the last checkpoint of a run."""

from __future__ import annotations

from collections.abc import Sequence

from ..checkpoint.format import last_good_checkpoint, no_good_checkpoint
from ..ranks.start import start_ranks
from ..run_directory import find_run


def start_evaluation(target: str, overrides: Sequence[str]) -> int:
    """Start as many ranks as wrote the last checkpoint of the run; return an exit status.

    Raises ValueError if there is no run or no checkpoint, or for an override other than `evaluate.*`.
    """
    run, overrides = find_run(target, overrides)
    recipe = run.recipe(overrides)
    saved = last_good_checkpoint(run.checkpoints)
    if saved is None:
        raise no_good_checkpoint(run.checkpoints)
    settings, queues = [str(run.path), *overrides], recipe.parallel.gpu_queues
    return start_ranks("longring.launch.evaluate", settings, saved[1].state.world_size, gpu_queues=queues)
