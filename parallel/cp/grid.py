"""Grids: the members of one family of context parallelism, given by three degrees and a route for each axis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args, get_type_hints

Route = Literal["round", "round_and_home", "both_ways", "direct"]
"""Way in which shares travel along an axis of n grid positions.

| route | shares | results for them |
|---|---|---|
| `round` | pass from neighbour to neighbour, one way | follow the share and are summed at each stop up to the owner |
| `round_and_home` | pass in the same way | go directly to the owner |
| `both_ways` | pass half of the axis in each direction | go directly to the owner |
| `direct` | the owner sends to each position, `in_flight` at a time | go directly to the owner |
"""

Order = Literal["rows", "rows_own_first", "columns", "columns_own_first"]
"""Order in which a rank computes its tiles: row by row (a row is one owner's queries) or column by column (one owner's
keys). The rank's own row or column comes last, to hide the results on their way, or first (`_own_first`), to hide the
shares on their way; its own tile is the first in every order."""

Layout = Literal["zigzag", "balanced", "documents"]
"""Division of the tokens of a sequence among ranks; `packed.divided` computes it."""


@dataclass(frozen=True)
class CpGrid:
    """A division of cp = heads x query x kv ranks; ranks count along heads first, then query, then kv.

    `query` alone is TokenRing (arXiv 2412.20501): queries travel, keys and values stay. `kv` alone is Ring Attention
    (arXiv 2310.01889): keys and values travel. `heads` alone is Ulysses (arXiv 2309.14509): each rank trades tokens
    for heads. With both query and kv, position (i, j) gathers queries along one axis and keys along the other and
    computes all query x kv tiles: its traffic grows with (query - 1) + (kv - 1), not with the product.

    Raises ValueError if a number is below 1, or if there is no such route or order.
    """

    heads: int = 1
    query: int = 1
    kv: int = 1
    query_route: Route = "round_and_home"
    kv_route: Route = "round"
    order: Order = "rows"
    in_flight: int = 1
    """Number of messages of one flow on their way to a rank at one time, on a `direct` route; each has a buffer."""

    def __post_init__(self) -> None:
        for name in ("heads", "query", "kv", "in_flight"):
            if getattr(self, name) < 1:
                raise ValueError(f"grid: {name} = {getattr(self, name)}: must be at least 1; leave it out for 1")
        for name, choices in (("query_route", Route), ("kv_route", Route), ("order", Order)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"grid: {name} = {getattr(self, name)!r}: must be one of {', '.join(get_args(choices))}; leave it "
                    "out for the default"
                )

    @classmethod
    def token_ring(cls, size: int) -> CpGrid:
        """Return TokenRing over `size` ranks."""
        return cls(query=size)

    @classmethod
    def ring(cls, size: int) -> CpGrid:
        """Return Ring Attention over `size` ranks, keys passed in one direction."""
        return cls(kv=size)

    @classmethod
    def ring_both_ways(cls, size: int) -> CpGrid:
        """Return Ring Attention over `size` ranks, keys passed in both directions."""
        return cls(kv=size, kv_route="both_ways")

    @classmethod
    def ulysses(cls, size: int) -> CpGrid:
        """Return Ulysses over `size` ranks."""
        return cls(heads=size)

    @classmethod
    def hybrid(cls, nodes: int, gpus_per_node: int) -> CpGrid:
        """Return TokenRing inside a node with keys and values passed across nodes."""
        return cls(query=gpus_per_node, kv=nodes, order="columns_own_first")

    @classmethod
    def square(cls, size: int) -> CpGrid:
        """Return the query x kv grid nearest to a square, every share sent directly by its owner."""
        # The largest divisor up to the square root.
        query = next(a for a in range(int(max(size, 1) ** 0.5), 0, -1) if size % a == 0)
        return cls(query=query, kv=size // query, query_route="direct", kv_route="direct")

    @classmethod
    def parse(cls, text: str) -> CpGrid:
        """Return the grid of a text such as "query=4, kv=2, kv_route=direct", the form that `str` gives.

        Raises ValueError for an unknown name or value, or for a name that is given twice.
        """
        # Fields are numbers or one of the literals of their type.
        hints, values = get_type_hints(cls), {}
        for item in text.split(","):
            name, equals, value = (part.strip() for part in item.partition("="))
            if not equals or name not in hints:
                raise ValueError(f"grid {text!r}: {item.strip()!r} is not NAME=VALUE; the names are {', '.join(hints)}")
            if name in values:
                raise ValueError(f"grid {text!r}: {name} is given twice; leave one of them out")
            choices = get_args(hints[name])
            if (choices and value not in choices) or (not choices and not value.isdecimal()):
                wanted = f"one of {', '.join(choices)}" if choices else "a whole number"
                default = "the default" if choices else 1
                raise ValueError(f"grid {text!r}: {name} = {value!r}: must be {wanted}; leave it out for {default}")
            values[name] = value if choices else int(value)
        return cls(**values)

    @property
    def size(self) -> int:
        """Number of ranks: the context-parallel degree."""
        return self.heads * self.query * self.kv

    @property
    def num_positions(self) -> int:
        """Number of grid positions, query x kv; the `heads` ranks of each hold its tokens together."""
        return self.query * self.kv

    def unfit(self, num_heads: int, num_kv_heads: int) -> str | None:
        """Return the reason why attention with these head counts cannot use this grid, or None if it can."""
        if num_heads % self.heads:
            return f"heads = {self.heads} does not divide {num_heads} query heads"
        # With fewer kv heads than ranks each kv head goes to an equal number of ranks.
        if num_kv_heads % self.heads and self.heads % num_kv_heads:
            return f"neither of heads = {self.heads} and {num_kv_heads} kv heads divides the other"
        return None

    def __str__(self) -> str:
        # Only fields that differ from the defaults. The default grid has none, and `parse` needs one: "query=1".
        plain = CpGrid()
        different = [f for f in fields(self) if getattr(self, f.name) != getattr(plain, f.name)]
        return ", ".join(f"{f.name}={getattr(self, f.name)}" for f in different) or "query=1"


NAMED = {
    "ring": CpGrid.ring,
    "ring_both_ways": CpGrid.ring_both_ways,
    "token_ring": CpGrid.token_ring,
    "ulysses": CpGrid.ulysses,
    "grid": CpGrid.square,
}
"""Grids by name, each made from a number of ranks."""


def divisions(size: int) -> Iterator[CpGrid]:
    """Yield every factorization of `size` into heads x query x kv, with default routes and order."""
    for heads in _divisors(size):
        for query in _divisors(size // heads):
            yield CpGrid(heads, query, size // heads // query)


def variants(base: CpGrid) -> Iterator[CpGrid]:
    """Yield the factorization of `base` with every combination of routes, order and depth that makes a difference."""
    # The order matters only if both axes have several tiles, the depth only if an axis is direct and longer than 2.
    orders = get_args(Order) if base.query > 1 and base.kv > 1 else (base.order,)
    for query_route in _routes(base.query, base.query_route):
        for kv_route in _routes(base.kv, base.kv_route):
            depths = {1}
            if "direct" in (query_route, kv_route) and base.num_positions > 2:
                depths |= {2, max(base.query, base.kv) - 1}
            for order in orders:
                for in_flight in sorted(depths):
                    yield replace(base, query_route=query_route, kv_route=kv_route, order=order, in_flight=in_flight)


def grids(size: int) -> Iterator[CpGrid]:
    """Yield the whole family over `size` ranks."""
    for base in divisions(size):
        yield from variants(base)


def _routes(size: int, unused: Route) -> tuple[Route, ...]:
    if size == 1:
        return (unused,)
    return get_args(Route) if size > 2 else ("direct",)  # all routes between two positions are the same


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
