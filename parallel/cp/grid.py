"""`CpGrid`: the members of one family of context parallelism, by three degrees and how each axis moves its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args, get_type_hints

Route = Literal["round", "round_and_home", "both_ways", "direct"]
"""How blocks move along an axis of n places.

| route | blocks | results for them |
|---|---|---|
| `round` | walk from neighbour to neighbour, one way | walk along, growing at each stop, and so come home |
| `round_and_home` | walk the same way | each goes straight home |
| `both_ways` | walk half of the places in each direction | each goes straight home |
| `direct` | their owner sends them to each place, `in_flight` at a time | each goes straight home |
"""

Order = Literal["rows", "rows_own_first", "columns", "columns_own_first"]
"""In which order a place computes its tiles: row by row (a row is one owner's queries) or column by column (one owner's
keys), its own row or column last, so that results travel under it, or first, so that blocks travel under it."""


@dataclass(frozen=True)
class CpGrid:
    """A member of the family: cp = heads x query x kv ranks, the axis of heads innermost, that of kv outermost.

    `query` alone is TokenRing (arXiv 2412.20501): queries travel, keys and values stay. `kv` alone is Ring Attention
    (arXiv 2310.01889): keys and values travel. `heads` alone is Ulysses (arXiv 2309.14509): each rank trades tokens
    for heads. In a grid rank (i, j) gathers queries along one axis and keys along the other and computes all
    query x kv tiles, so that what it moves grows with (query - 1) + (kv - 1), not with the product.
    """

    heads: int = 1
    query: int = 1
    kv: int = 1
    query_route: Route = "round_and_home"
    kv_route: Route = "round"
    order: Order = "rows"
    in_flight: int = 1
    """Messages of one flow that are under way to a place at a time, on a `direct` route; each needs its buffer."""

    def __post_init__(self) -> None:
        for name in ("heads", "query", "kv", "in_flight"):
            if getattr(self, name) < 1:
                raise ValueError(f"grid: {name} = {getattr(self, name)} must be at least 1")

    @classmethod
    def token_ring(cls, size: int) -> CpGrid:
        """TokenRing over `size` ranks."""
        return cls(query=size)

    @classmethod
    def ring(cls, size: int) -> CpGrid:
        """Ring Attention over `size` ranks, one way round."""
        return cls(kv=size)

    @classmethod
    def ring_both_ways(cls, size: int) -> CpGrid:
        """Ring Attention over `size` ranks, half of the blocks each way round."""
        return cls(kv=size, kv_route="both_ways")

    @classmethod
    def ulysses(cls, size: int) -> CpGrid:
        """Ulysses over `size` ranks."""
        return cls(heads=size)

    @classmethod
    def hybrid(cls, nodes: int, gpus_per_node: int) -> CpGrid:
        """TokenRing inside a node, keys and values across nodes (arXiv 2412.20501, section 3.3)."""
        return cls(query=gpus_per_node, kv=nodes, order="columns_own_first")

    @classmethod
    def square(cls, size: int) -> CpGrid:
        """The query x kv grid nearest to a square, every block sent by its owner."""
        query = next(a for a in range(int(size**0.5), 0, -1) if size % a == 0)
        return cls(query=query, kv=size // query, query_route="direct", kv_route="direct")

    @classmethod
    def parse(cls, text: str) -> CpGrid:
        """The grid of a text like "query=4, kv=2, kv_route=direct", as `str` writes it. Raises ValueError."""
        hints, values = get_type_hints(cls), {}
        for item in text.split(","):
            name, equals, value = (part.strip() for part in item.partition("="))
            if not equals or name not in hints:
                raise ValueError(f"grid {text!r}: {item.strip()!r} is not NAME=VALUE with a name of {', '.join(hints)}")
            choices = get_args(hints[name])
            if (choices and value not in choices) or (not choices and not value.isdecimal()):
                wanted = ", ".join(choices) if choices else "a number"
                raise ValueError(f"grid {text!r}: {name} = {value!r} must be {wanted}")
            values[name] = value if choices else int(value)
        return cls(**values)

    @property
    def size(self) -> int:
        """Ranks of the context-parallel group."""
        return self.heads * self.query * self.kv

    @property
    def places(self) -> int:
        """Places of the query x kv grid; the ranks of each share its tokens by heads."""
        return self.query * self.kv

    def unfit(self, num_heads: int, num_kv_heads: int) -> str | None:
        """Why attention with these heads on a rank cannot be divided so, or None."""
        if num_heads % self.heads:
            return f"heads = {self.heads} does not divide {num_heads} query heads"
        if num_kv_heads % self.heads and self.heads % num_kv_heads:
            return f"neither of heads = {self.heads} and {num_kv_heads} kv heads divides the other"
        return None

    def __str__(self) -> str:
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
"""Members that a number of ranks alone determines."""


def divisions(size: int) -> Iterator[CpGrid]:
    """Every way to write `size` as heads x query x kv."""
    for heads in _divisors(size):
        for query in _divisors(size // heads):
            yield CpGrid(heads, query, size // heads // query)


def moves(base: CpGrid) -> Iterator[CpGrid]:
    """The division of `base` with every route, order and depth that differ in it."""
    orders = get_args(Order) if base.query > 1 and base.kv > 1 else (base.order,)
    for query_route in _routes(base.query, base.query_route):
        for kv_route in _routes(base.kv, base.kv_route):
            depths = {1}
            if "direct" in (query_route, kv_route) and base.places > 2:
                depths |= {2, max(base.query, base.kv) - 1}
            for order in orders:
                for in_flight in sorted(depths):
                    yield replace(base, query_route=query_route, kv_route=kv_route, order=order, in_flight=in_flight)


def grids(size: int) -> Iterator[CpGrid]:
    """The whole family over `size` ranks."""
    for base in divisions(size):
        yield from moves(base)


def _routes(size: int, unused: Route) -> tuple[Route, ...]:
    if size == 1:
        return (unused,)
    return get_args(Route) if size > 2 else ("direct",)  # between two places all ways are one


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
