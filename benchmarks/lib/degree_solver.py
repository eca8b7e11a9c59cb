"""The best degrees of context parallelism of one batch: groups of ranks of several degrees side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import coo_array

GAP = 0.005
"""Relative gap to the solver's own bound at which it stops."""
NODES = 2_000
"""Most nodes of its search."""


class Unit(NamedTuple):
    """Sequences of one length on a group of ranks."""

    length: int
    """Tokens of a sequence."""
    degree: int
    """Number of ranks of the group, a power of two."""
    seconds: float
    """Time of one sequence on the group."""
    most: int
    """Most sequences that the group holds in a micro-batch."""


class Degrees(NamedTuple):
    """Degrees of one batch."""

    seconds: float
    """Time of its micro-batches."""
    num_micro_batches: int
    num_degrees: float
    """Different degrees side by side, the mean of all micro-batches."""
    gap: float
    """Relative gap to the solver's bound when it stopped."""


def best_degrees(units: Sequence[Unit], counts: Mapping[int, int], num_ranks: int, each_s: float) -> Degrees:
    """Return the best division of a batch into micro-batches, groups and degrees; `each_s` is added to a micro-batch.

    `counts` has the number of sequences of each length. A micro-batch takes as long as its slowest group, a group has
    sequences of one length, and there are as many micro-batches as are best. Degrees are powers of two, as is the
    number of ranks, so groups whose degrees add up to it always fit side by side. This is an integer program: numbers
    of micro-batches by duration, and of groups in them by length and degree. Durations are those of full groups and of
    a half, a quarter or an eighth of their sequences. It is solved to `GAP`, or for `NODES` nodes.
    """
    durations = _thinned(
        sorted({number * unit.seconds for unit in units for part in (1, 2, 4, 8) if (number := unit.most // part)})
    )
    lengths = sorted(counts)
    # Variables: micro-batches by duration, then groups by duration and unit.
    groups = [
        (at, unit, min(unit.most, int(seconds / unit.seconds * (1 + 1e-9))))
        for at, seconds in enumerate(durations)
        for unit in units
        if unit.length in counts and seconds * (1 + 1e-9) >= unit.seconds
    ]
    # (constraint, variable, coefficient): ranks of the micro-batches of a duration, less those of their groups.
    entries: list[tuple[int, int, float]] = [(at, at, num_ranks) for at in range(len(durations))]
    for variable, (at, unit, number) in enumerate(groups, len(durations)):
        entries.append((at, variable, -unit.degree))
        entries.append((len(durations) + lengths.index(unit.length), variable, number))
    rows, columns, values = zip(*entries, strict=True)
    shape = len(durations) + len(lengths), len(durations) + len(groups)
    least: Any = np.array([0.0] * len(durations) + [counts[length] for length in lengths])  # scipy's types say a float
    found = milp(
        np.array([seconds + each_s for seconds in durations] + [0.0] * len(groups)),
        integrality=np.ones(shape[1]),
        constraints=LinearConstraint(coo_array((values, (rows, columns)), shape).tocsr(), least),
        options={"mip_rel_gap": GAP, "node_limit": NODES},
    )
    assert found.x is not None, f"some number of micro-batches holds every batch: {found.message}"
    taken = np.round(found.x).astype(int)
    micro_batches = taken[: len(durations)]
    used = {(at, unit.degree) for (at, unit, _), count in zip(groups, taken[len(durations) :], strict=True) if count}
    kinds = np.bincount([at for at, _ in used], minlength=len(durations))
    return Degrees(
        float(micro_batches @ (np.array(durations) + each_s)),
        int(micro_batches.sum()),
        float(micro_batches @ kinds / micro_batches.sum()),
        float(found.mip_gap),
    )


def least_rank_seconds(units: Sequence[Unit], counts: Mapping[int, int]) -> float:
    """Return the least sum of all ranks' seconds, each sequence on the degree that takes the fewest.

    Divided by the number of ranks it is a bound that no division of the batch goes below.
    """
    return sum(
        count * min(unit.degree * unit.seconds for unit in units if unit.length == length)
        for length, count in counts.items()
    )


def _thinned(ascending: Sequence[float]) -> list[float]:
    """Return values of which none is within 1% of the one before, the last among them."""
    found = [ascending[-1]]
    for value in reversed(ascending):
        if value < found[-1] / 1.01:
            found.append(value)
    return found[::-1]
