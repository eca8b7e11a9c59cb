"""Which member of the family to take: those that fit are played on the topology, and the cheapest is taken."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .cost import Price, Speed, Work, play
from .grid import CpGrid, divisions, moves
from .layout import zigzag
from .plan import Pass
from .schedules import Schedule
from .topology import Topology
from .visible import Sight

CLOSE = 1.01
"""Prices within 1% are one: of such the member that holds the least memory is taken."""
LARGE = 16
"""Beyond so many ranks are priced: the 6 divisions that move the fewest bytes, those that fill a node with heads and
queries, and up to 16 times as many the ring. Beyond 4 times as many, by their simplest moves alone."""


@dataclass(frozen=True)
class Priced:
    """A grid, and what one layer's attention costs on it."""

    grid: CpGrid
    passes: dict[Pass, Price]

    @property
    def seconds(self) -> float:
        """Of all passes."""
        return sum(price.seconds for price in self.passes.values())

    @property
    def exposed_s(self) -> float:
        """Communication that no computation hides, in all passes."""
        return sum(price.exposed_s for price in self.passes.values())

    @property
    def peak_bytes(self) -> int:
        """Most that a rank holds of others'."""
        return max(price.peak_bytes for price in self.passes.values())


@dataclass(frozen=True)
class Question:
    """What is to be computed, and on what: one layer over a sequence in zigzag layout, as one document."""

    num_tokens: int
    work: Work
    topology: Topology
    speed: Speed
    sight: Sight = field(default_factory=Sight)
    passes: tuple[Pass, ...] = ("forward", "backward")

    def price(self, grid: CpGrid) -> Priced:
        """What it costs on a grid."""
        layouts = [zigzag(self.num_tokens, rank, grid.size) for rank in range(grid.size)]

        def played(direction: Pass) -> Price:
            schedule = Schedule(grid, layouts, self.sight, direction)
            return play(schedule, self.sight, self.topology, self.work, self.speed)

        return Priced(grid, {direction: played(direction) for direction in self.passes})


def choose(size: int, question: Question) -> list[Priced]:
    """The best grid of every division of `size` ranks that fits the heads and is priced (see `LARGE`), best first.

    First each is priced with its simplest moves; then, of few ranks, all moves and orders of the best three. Raises
    ValueError for a topology that does not reach so far.
    """
    work, topology = question.work, question.topology
    if not topology.fits(size):
        raise ValueError(
            f"topology {topology.name!r} has {topology.ranks_per_node} ranks and says nothing of more: context "
            f"parallelism over {size} needs one that does"
        )

    fit = [base for base in divisions(size) if base.unfit(work.num_heads, work.num_kv_heads) is None]
    if size > LARGE:
        by_bytes = sorted(fit, key=lambda base: _moved(base, work))
        # Bytes alone do not say what crosses from node to node: with hybrids only keys and values, with a ring only
        # those of one rank of a node, which wins where nodes share a port.
        crossing = [base for base in by_bytes[6:] if base.heads * base.query == topology.ranks_per_node]
        ring = [base for base in by_bytes[6:] if base.kv == size and size <= 16 * LARGE]
        fit = by_bytes[:6] + crossing + ring
    simple = (
        replace(base, query_route=routes[0], kv_route=routes[1], order=order)
        for base in fit
        for routes in (("direct", "direct"), ("round_and_home", "round"), ("both_ways", "both_ways"))
        for order in (("rows", "columns_own_first") if base.query > 1 and base.kv > 1 else ("rows",))
    )
    candidates = [question.price(grid) for grid in simple]
    for first in _best_of_each(candidates)[:3] if size <= 4 * LARGE else ():
        base = CpGrid(first.grid.heads, first.grid.query, first.grid.kv)
        candidates += map(question.price, moves(base))
    return _best_of_each(candidates)


def _best_of_each(candidates: list[Priced]) -> list[Priced]:
    """The best of each division, best first: of all those close to the fastest of all, that with the least memory."""
    by_division: dict[tuple[int, int, int], list[Priced]] = {}
    for candidate in candidates:
        grid = candidate.grid
        by_division.setdefault((grid.heads, grid.query, grid.kv), []).append(candidate)
    first = _least_memory_of_close(candidates)
    del by_division[first.grid.heads, first.grid.query, first.grid.kv]
    others = (_least_memory_of_close(found) for found in by_division.values())
    return [first, *sorted(others, key=lambda x: x.seconds)]


def _least_memory_of_close(candidates: list[Priced]) -> Priced:
    fastest = min(candidate.seconds for candidate in candidates)
    close = [candidate for candidate in candidates if candidate.seconds <= CLOSE * fastest]
    return min(close, key=lambda candidate: (candidate.peak_bytes, candidate.seconds, str(candidate.grid)))


def _moved(grid: CpGrid, work: Work) -> float:
    """Numbers that a rank moves in forward and backward for each of its tokens, in units of its queries."""
    g = work.num_heads / work.num_kv_heads
    of_heads = 2 * (2 + 2 / g) * (grid.heads - 1) / grid.heads
    return of_heads + 5 * (grid.query - 1) + 8 / g * (grid.kv - 1)
