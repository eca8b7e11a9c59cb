"""Records of renewals, renewals.jsonl of a run: the losses from which the shares of its sources follow.

The order of a run follows from its recipe and these records, so every later start replays it exactly. A loss is
measured once: a run that comes to the same step again, after a rewind or on other ranks, takes the record.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ..data.files import sha256_of_json, sync
from ..data.read.batch_order import BatchOrder
from ..data.read.curriculum import cycle_begins
from ..data.read.renewal import Renewal
from .config import Recipe
from .records import Record, append_record, parsed_lines

TOLD_SOURCES = 8
"""Most sources that the line of a renewal names."""


def renewal_steps(recipe: Recipe) -> tuple[int, ...]:
    """Return the numbers of steps done after which a run with this recipe renews its shares."""
    curriculum, train = recipe.curriculum, recipe.train
    if not curriculum.renewal.rate:
        return ()
    # Slots of one step.
    slots = train.global_batch_tokens // curriculum.tokens_of_slot(recipe.lengths, train.global_batch_tokens)
    cycles = curriculum.num_cycles(len(recipe.lengths), train.steps, slots)
    return tuple(cycle_begins(train.steps, cycles)[1:-1])  # neither before the first cycle nor after the last


def append_renewal(file: Path, run: str, renewal: Renewal, shares: Mapping[str, float]) -> None:
    """Append a renewal of the run with an id, and for readers the shares of the next cycle; flush it to the disk.

    Raises OSError if it cannot be written.
    """
    content = {"run": run, "step": renewal.step, "losses": dict(renewal.losses), "shares": dict(shares)}
    try:
        append_record(file, {**content, "sha256": sha256_of_json(content)})
        sync(file)
    except OSError as error:
        raise OSError(
            f"{file}: the losses after step {renewal.step} cannot be recorded: {error.strerror or error}; make room, "
            "or bring the directory back, and the same command continues from the last checkpoint"
        ) from error


def read_renewals(file: Path, run: str) -> tuple[Renewal, ...]:
    """Return the renewals of the run with an id, oldest first. A file that does not exist has none.

    A last line without its end, which a crash leaves, does not count. Raises ValueError for any other line that is not
    as it was written, or of another run, and OSError if the file cannot be read.
    """
    lines, found = parsed_lines(file), {}
    for number, (line, record) in enumerate(lines, 1):
        if record is None and number == len(lines) and not line.endswith(b"\n"):
            continue
        if record is None or not _is_whole(record):
            raise ValueError(
                f"{file}: line {number} is not as it was written, and the batches of the run follow from it; bring a "
                "copy of the file back, or name another run_directory"
            )
        if record["run"] != run:
            raise ValueError(
                f"{file}: line {number} is of run {record['run']}, and the run is {run}; bring the file of this run "
                "back, or name another run_directory"
            )
        found[record["step"]] = Renewal(record["step"], record["losses"])  # the last record of a step counts
    return tuple(found[step] for step in sorted(found))


def _is_whole(record: Record) -> bool:
    """Return whether a record has the content that it was written with, and that is a renewal."""
    content = {key: value for key, value in record.items() if key not in ("time", "sha256")}
    losses = content.get("losses")
    return (
        sha256_of_json(content) == record.get("sha256")
        and content.keys() == {"run", "step", "losses", "shares"}
        and type(content["step"]) is int
        and isinstance(losses, dict)
        and all(type(loss) is float and math.isfinite(loss) for loss in losses.values())
    )


def check_recorded(file: Path, renewals: Sequence[Renewal], steps: Collection[int], steps_done: int) -> None:
    """Raise ValueError if `renewals` lack one after one of `steps` before `steps_done`: later steps trained by it."""
    missing = sorted({step for step in steps if step < steps_done} - {renewal.step for renewal in renewals})
    if missing:
        raise ValueError(
            f"{file}: lacks the losses after step {missing[0]}, from which the batches up to step {steps_done} follow; "
            "bring a copy of the file back, or name another run_directory"
        )


def shares_between(order: BatchOrder, first: int, last: int) -> dict[str, float]:
    """Return the share of each source in the tokens of steps first + 1 to `last`."""
    tokens: Counter[str] = Counter()
    for step, sign in ((last, 1), (first, -1)):  # all up to `last`, less those up to `first`
        for cell in order.trained(step):
            tokens[cell.source] += sign * cell.tokens
    return {source: count / tokens.total() for source, count in tokens.items()}


def renewal_line(renewal: Renewal, shares: Mapping[str, float]) -> str:
    """Return the shares of the next cycle and the losses as text, the highest loss first."""
    ranked = sorted(renewal.losses.items(), key=lambda item: -item[1])
    told = ", ".join(f"{source} {shares[source]:.1%} (loss {loss:.3f})" for source, loss in ranked[:TOLD_SOURCES])
    return f"shares {told}" + (f" and {more} more" if (more := len(ranked) - TOLD_SOURCES) > 0 else "")
