"""Choice of a grid: all grids that fit the heads are simulated on the topology, and the cheapest is chosen."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ...kernels.layout import SeqLayout
from .cost import ASSUMED, AttentionShape, Price, Speed, play
from .grid import CpGrid, divisions, variants
from .packed import divided
from .plan import Pass
from .schedules import Schedule
from .topology import Topology
from .visible import Visibility

CLOSE = 1.01
"""Prices within 1% count as equal: among them the grid with the least memory is chosen."""
LARGE = 16
"""Number of ranks up to which every division is priced.

With more ranks the divisions are the 6 that move the fewest bytes, those whose heads x query fills a node, and, up to
16 x LARGE ranks, the ring. With more than 4 x LARGE ranks only their simplest routes and orders are priced."""


@dataclass(frozen=True)
class PricedGrid:
    """A grid with the simulated cost of one layer's attention on it."""

    grid: CpGrid
    passes: dict[Pass, Price]
    """Price of each pass."""

    @property
    def seconds(self) -> float:
        """Seconds of all passes together."""
        return sum(price.seconds for price in self.passes.values())

    @property
    def exposed_s(self) -> float:
        """Exposed communication of all passes together, in seconds."""
        return sum(price.exposed_s for price in self.passes.values())

    @property
    def peak_bytes(self) -> int:
        """Largest number of bytes that a rank holds for others at one time, in any pass."""
        return max(price.peak_bytes for price in self.passes.values())


@dataclass(frozen=True)
class Pricer:
    """Everything but the grid that determines a price: one layer's attention, with equal work on all ranks."""

    num_tokens: int
    """Tokens of the sequence."""
    shape: AttentionShape
    topology: Topology
    speed: Speed = ASSUMED
    visibility: Visibility = field(default_factory=Visibility)
    passes: tuple[Pass, ...] = ("forward", "backward")
    document_starts: tuple[int, ...] = (0,)
    """Positions at which documents begin."""

    def layouts(self, size: int) -> list[SeqLayout]:
        """Return the layout of each of `size` ranks; one document is in zigzag.

        Raises ValueError if the sequence has fewer than 2 tokens a rank.
        """
        windows = ((self.visibility.window, 1),)
        shares = divided("balanced", self.num_tokens, self.document_starts, size, windows)
        return [SeqLayout(runs, self.document_starts) for runs in shares]

    def schedule(self, grid: CpGrid, direction: Pass) -> Schedule:
        """Return the schedule of a pass on a grid: its `plan(rank)` has the steps of one rank, with their messages.

        Raises ValueError as `layouts` does.
        """
        return Schedule(grid, self.layouts(grid.size), self.visibility, direction)

    def price(self, grid: CpGrid) -> PricedGrid:
        """Return the grid with its price. Raises ValueError as `layouts` does."""
        first, *others = self.passes
        schedule = self.schedule(grid, first)
        schedules = [schedule, *(schedule.turned(direction) for direction in others)]
        prices: dict[Pass, Price] = {x.direction: play(x, self.topology, self.shape, self.speed) for x in schedules}
        return PricedGrid(grid, prices)


def choose(size: int, pricer: Pricer) -> list[PricedGrid]:
    """Return the best grid of every division of `size` ranks that fits the heads and is priced (`LARGE`), best first.

    Each division is priced with its simplest routes and orders, then, up to 4 x LARGE ranks, the best three with all
    routes and orders. Raises ValueError if there are no ranks, or if the topology has fewer.
    """
    if size < 1:
        raise ValueError(f"size = {size}: must be at least 1; give the number of ranks that share a sequence")
    shape, topology = pricer.shape, pricer.topology
    if not topology.covers(size):
        raise ValueError(
            f"topology {topology.name!r}: has {topology.ranks_per_node} ranks, and context parallelism is over {size}; "
            "take one of several nodes, or measure it (`probe`; in a recipe parallel.cp.topology = 'probe')"
        )

    fit = [base for base in divisions(size) if base.unfit(shape.num_heads, shape.num_kv_heads) is None]
    if size > LARGE:
        by_bytes = sorted(fit, key=lambda base: _moved(base, shape))
        # Bytes do not show the traffic between nodes. Where heads x query fills a node, only keys and values cross; in
        # a ring only one rank of each node sends across, which wins where the ranks of a node share a port.
        crossing = [base for base in by_bytes[6:] if base.heads * base.query == topology.ranks_per_node]
        ring = [base for base in by_bytes[6:] if base.kv == size and size <= 16 * LARGE]
        fit = by_bytes[:6] + crossing + ring
    # Three pairs of routes (query, kv) and, with both axes, two orders: enough to rank the divisions. Where documents
    # are packed, few rows travel, so all may leave at once.
    at_once = len(pricer.document_starts) > 1 and size <= 4 * LARGE
    simple = (
        replace(base, query_route=routes[0], kv_route=routes[1], order=order, in_flight=in_flight)
        for base in fit
        for routes in (("direct", "direct"), ("round_and_home", "round"), ("both_ways", "both_ways"))
        for order in (("rows", "columns_own_first") if base.query > 1 and base.kv > 1 else ("rows",))
        for in_flight in sorted({1, max(base.query, base.kv, 2) - 1 if at_once and "direct" in routes else 1})
    )
    candidates = [pricer.price(grid) for grid in simple]
    # Pricing all variants of a division takes long, so only the three leading divisions are priced in full.
    for first in _best_of_each(candidates)[:3] if size <= 4 * LARGE else ():
        base = CpGrid(first.grid.heads, first.grid.query, first.grid.kv)
        candidates += map(pricer.price, variants(base))
    return _best_of_each(candidates)


def _best_of_each(candidates: list[PricedGrid]) -> list[PricedGrid]:
    """Return the best grid of each division, the best of all first, the others by time."""
    # The first grid is chosen among all candidates, each other grid within its division, both by `CLOSE` and memory.
    by_division: dict[tuple[int, int, int], list[PricedGrid]] = {}
    for candidate in candidates:
        grid = candidate.grid
        by_division.setdefault((grid.heads, grid.query, grid.kv), []).append(candidate)
    first = _least_memory_of_close(candidates)
    del by_division[first.grid.heads, first.grid.query, first.grid.kv]
    others = (_least_memory_of_close(found) for found in by_division.values())
    return [first, *sorted(others, key=lambda x: x.seconds)]


def _least_memory_of_close(candidates: list[PricedGrid]) -> PricedGrid:
    """Return the grid with the least memory among the grids that are `CLOSE` to the fastest."""
    fastest = min(candidate.seconds for candidate in candidates)
    close = [candidate for candidate in candidates if candidate.seconds <= CLOSE * fastest]
    return min(close, key=lambda candidate: (candidate.peak_bytes, candidate.seconds, str(candidate.grid)))


def _moved(grid: CpGrid, shape: AttentionShape) -> float:
    """Return the elements that a rank sends in both passes, in units of its queries, without a causal mask."""
    g = shape.num_heads / shape.num_kv_heads
    # For each other position on the query axis 2 units forward and 3 backward; on the kv axis 2 + (2 + 4), over g: dK
    # and dV are summed in fp32.
    of_heads = 2 * (2 + 2 / g) * (grid.heads - 1) / grid.heads
    return of_heads + 5 * (grid.query - 1) + 8 / g * (grid.kv - 1)
