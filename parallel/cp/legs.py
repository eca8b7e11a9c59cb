"""Legs: the journeys of shares along an axis of a grid, and the order of the tiles that use them."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from .grid import Order, Route


class Leg(NamedTuple):
    """Journey of one share to one position; leg n brings the share of the position's n-th row (or column) of tiles.

    `owner` and `source` are offsets along the axis, counted from the position that receives the share.
    """

    owner: int
    """Offset of the position that owns the share."""
    source: int
    """Offset of the position that sends it here: the owner, or a neighbour that passes it on."""
    after: int
    """Number of the leg whose share is first used at the step at which this one is posted; 0 is the own share."""
    before: int | None
    """Number of the leg after whose last tile the results of this leg are due; None: at the end of the pass."""
    onward: int | None
    """Number of the leg on which the share is passed on from here; None: this is its last stop."""


def legs(route: Route, size: int, in_flight: int) -> tuple[Leg, ...]:
    """Return legs 1, 2, ..., size - 1 of an axis of `size` positions."""
    if route == "both_ways":
        owners = [(number + 1) // 2 * (1 if number % 2 else -1) for number in range(1, size)]  # 1, -1, 2, -2, ...
        turn = 2  # shares of the two directions alternate
    else:
        owners = list(range(1, size))
        turn = in_flight if route == "direct" else 1
    found = []
    for number, owner in enumerate(owners, 1):
        before = number + turn if number + turn < size else None
        if route == "direct":
            found.append(Leg(owner, owner, max(0, number - turn), before, None))
        else:
            found.append(Leg(owner, 1 if owner > 0 else -1, max(0, number - turn), before, before))
    return tuple(found)


def tile_order(query: int, kv: int, order: Order) -> list[tuple[int, int]]:
    """Return (row number, column number) of a position's tiles in the order of computation; (0, 0) is first.

    Number 0 is the position's own row or column, number n that of leg n.
    """
    by_rows = order.startswith("rows")
    lines, tiles_of_a_line = (query, kv) if by_rows else (kv, query)
    walk = list(product(range(lines), range(tiles_of_a_line)))
    # The own tile needs no message; the rest of the own line is moved to the end, where results are on their way.
    if not order.endswith("own_first"):
        walk = walk[:1] + walk[tiles_of_a_line:] + walk[1:tiles_of_a_line]
    return walk if by_rows else [(u, t) for t, u in walk]
