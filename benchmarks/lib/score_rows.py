"""Losses of weights on rows of tokens, in a process of its own: the ends of rows, after what is visible of them.

    python -m lib.score_rows WEIGHTS DATA ROWS.npz SUMS.npy [key=value ...]

DATA is prepared data with a bucket of this length. ROWS.npz has `tokens` [rows, length + 1], `starts` [rows], the
first visible position, and `parts` uint8 [rows, length], the part of each target; part 0 does not count. SUMS.npy gets
the sum of the losses and the number of targets of each row and part, [rows, parts, 2].
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
from longring.launch.evaluate import opened
from longring.launch.evaluation.score import Row, Scorer
from longring.launch.ranks.watchdog import Watchdog
from longring.launch.run_directory import RunDirectory
from longring.launch.target import target_of_weights
from longring.parallel.meet import meet
from longring.parallel.mesh import join
from longring.parallel.world import World

from .one_rank import be_the_only_rank


def main() -> int:
    weights, data, rows_file, sums_file, *settings = sys.argv[1:]
    be_the_only_rank()
    world = World.from_environment()
    store = meet(world, timedelta(minutes=10))
    logs = RunDirectory(str(Path(sums_file).parent / "score-logs"))
    target = target_of_weights(Path(weights), data, settings, logs, store, world)
    with np.load(rows_file) as found:
        tokens, starts, parts = found["tokens"], found["starts"], found["parts"]
    length = parts.shape[1]

    def row(number: int) -> Row:
        start = int(starts[number])
        return Row(tokens[number], parts[number], (0, start) if start else (0,))

    mesh = join(target.recipe.parallel, target.recipe.max_context_parallel, 10, store)
    with Watchdog(target.run, 0, 1, 0) as watchdog:
        _, measurement = opened(target, mesh, watchdog, [length])
        loss = measurement.held_out
        scorer = Scorer(loss.engine, loss.mesh, measurement.layouts[length], loss.at)
        scorer.engine.eval()
        sums = scorer.sums(len(tokens), int(parts.max()) + 1, row)  # [rows, parts, (loss, right, tokens)]
    np.save(sums_file, sums[:, 1:, [0, 2]])
    return 0


if __name__ == "__main__":
    sys.exit(main())
